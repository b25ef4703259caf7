"""Options that are made from the fields of specs: names, types, defaults, help, and what reaches the command."""

import re
from typing import Annotated, Any, Literal

import pytest
import typer
from click.testing import Result
from pydantic import Field
from typer.testing import CliRunner

from vitopt import cli, inference
from vitopt.cli.options import Fields, from_fields, refuse
from vitopt.errors import RecipeError
from vitopt.recipe import EvaluateSpec, RunSpec, Spec


class Oven(Spec):
    heats: tuple[int, ...] = Field((1, 2), description="degrees in turn")
    seconds: int = Field(60, ge=1, description="seconds in it")


class Cake(Spec):
    shape: Literal["round", "square"] = Field("round", description="outline from above")
    iced: bool = Field(False, description="sugar on top")
    baked_twice: bool = Field(True, description="as a biscuit")
    nuts: tuple[str, ...] = Field(("hazel",), description="which nuts")
    weight: float | None = Field(None, gt=0, description="kilograms")
    oven: Oven = Oven()


class Guest(Spec):
    name: str = Field(min_length=1, description="who comes")
    age: int = Field(30, ge=0, description="years")


PATHS = ("shape", "iced", "baked_twice", "nuts", "weight", "oven.heats", "oven.seconds")
CakeOptions = Annotated[Cake, Fields(PATHS, named={"nuts": "nut"}, help={"weight": "heavier is later"})]


def called(*arguments: str) -> tuple[dict[str, Any], Result]:
    """What reaches a command with options from two specs, and what it printed."""
    got: dict[str, Any] = {}
    app = typer.Typer(context_settings={"help_option_names": ["--help"]})

    def check(context: typer.Context) -> None:
        if context.params["shape"] == "square":
            refuse(context, "baked_twice", "nut", because="square ones are plain")

    @app.command()
    @from_fields(check)
    def bake(*, cake: CakeOptions, guest: Annotated[Guest | None, Fields()], plates: int = 1) -> None:
        """Bake."""
        got.update(cake=cake, guest=guest, plates=plates)

    return got, CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, arguments)


def test_without_options_all_is_as_the_fields_say() -> None:
    got, result = called()
    assert result.exit_code == 0, result.output
    assert got == {"cake": Cake(), "guest": None, "plates": 1}
    assert got["cake"].model_fields_set == set()


@pytest.mark.parametrize(
    ("arguments", "cake"),
    [
        (["--shape", "square"], Cake(shape="square")),
        (["--iced"], Cake(iced=True)),
        (["--no-baked-twice"], Cake(baked_twice=False)),
        (["--nut", "pecan", "--nut", "wal"], Cake(nuts=("pecan", "wal"))),
        (["--weight", "1.5"], Cake(weight=1.5)),
        (["--heats", "7,8"], Cake(oven=Oven(heats=(7, 8)))),
        (["--seconds", "5", "--heats", "9"], Cake(oven=Oven(heats=(9,), seconds=5))),
    ],
)
def test_an_option_sets_its_field_and_no_other(arguments: list[str], cake: Cake) -> None:
    got, _ = called(*arguments)
    assert got["cake"] == cake and got["cake"].model_fields_set == cake.model_fields_set


def test_a_default_that_is_written_out_counts_as_given() -> None:
    assert called("--shape", "round")[0]["cake"].model_fields_set == {"shape"}


def test_a_spec_that_may_be_none_needs_its_required_field() -> None:
    assert called("--name", "Ada", "--plates", "2")[0] == {"cake": Cake(), "guest": Guest(name="Ada"), "plates": 2}
    assert called("--age", "4")[0]["guest"] is None


def test_two_fields_cannot_be_one_option() -> None:
    with pytest.raises(ValueError, match="duplicate parameter name"):
        from_fields()(_of_two_names)


def _of_two_names(*, guest: Guest, host: Guest) -> None: ...


def test_a_required_list_must_be_given() -> None:
    class Party(Spec):
        games: tuple[str, ...] = Field(description="in turn")

    app, got = typer.Typer(), []

    def play(*, party: Party) -> None:
        got.append(party.games)

    app.command()(from_fields()(play))
    assert CliRunner().invoke(app, []).exit_code == 2
    assert CliRunner().invoke(app, ["--games", "chess", "--games", "go"]).exit_code == 0
    assert got == [("chess", "go")]


def test_choices_are_those_of_the_field() -> None:
    _, result = called("--shape", "oval")
    assert result.exit_code == 2 and "square" in result.output


def test_all_mistakes_of_all_specs_are_told_at_once() -> None:
    _, result = called("--seconds", "0", "--weight", "-1", "--heats", "1,x", "--name", "", "--age", "-1")
    assert isinstance(result.exception, RecipeError)
    first, *lines = str(result.exception).splitlines()
    assert "5 mistakes" in first
    assert [line.split(":")[0].strip() for line in lines] == [
        "cake.weight", "cake.oven.heats.1", "cake.oven.seconds", "guest.name", "guest.age",
    ]  # fmt: skip


def test_what_would_do_nothing_is_refused_before_what_is_wrong() -> None:
    _, result = called("--shape", "square", "--nut", "wal", "--no-baked-twice", "--seconds", "0")
    assert str(result.exception) == "--no-baked-twice, --nut: square ones are plain"
    assert called("--shape", "square")[1].exit_code == 0


def test_help_shows_what_the_fields_say() -> None:
    text = re.sub(" +", " ", called("--help")[1].output)
    for line in (
        "--shape <round|square> Outline from above. [default: round]",
        "Sugar on top.",
        "As a biscuit. [default: baked-twice]",
        "Which nuts. [default: hazel]",
        "Heavier is later.",
        "Degrees in turn. [default: 1,2]",
        "Years. [default: 30]",
    ):
        assert line in text
    assert "--no-baked-twice" in text and "--no-iced" not in text and "kilograms" not in text.lower()


# The commands of vitopt


def test_every_option_says_what_it_is() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    options = [(name, one) for name, command in commands.items() for one in command.params if one.name != "help"]
    assert len(options) > 100
    assert [f"{name} {one.name}" for name, one in options if not one.help] == []


def test_benchmark_without_options_measures_as_a_recipe_does(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def measure(candidates: Any, spec: EvaluateSpec, **_: Any) -> list[Any]:
        measured.extend([spec, [one.run for one in candidates]])
        return []

    monkeypatch.setattr(inference, "measure", measure)
    result = CliRunner().invoke(cli.app, ["benchmark", "random:vit-tiny-patch16-32"])
    assert result.exit_code == 0, result.output
    assert measured == [EvaluateSpec(), [RunSpec()]]


def test_mistakes_in_different_parts_of_a_command_are_told_at_once() -> None:
    wrong = ["--limit", "0", "--batch-size", "0", "--autotune"]
    result = CliRunner().invoke(cli.app, ["evaluate", "absent", "--data", "absent", *wrong])
    assert result.exit_code == 1 and "3 mistakes" in result.stderr
    for name in ("limit", "batch_size", "autotune"):
        assert name in result.stderr
