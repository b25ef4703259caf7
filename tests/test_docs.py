"""The pages of docs/: each command in them is run, with a tiny model and tiny images for MODEL and DATA."""

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import yaml
from commands import vitopt
from conftest import make_images

from vitopt.environment import support
from vitopt.optimize import compiled
from vitopt.recipe_file import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = ("first-model", "formats", "report", "gpu", "ci", "notebook")
FIGURES_ASIDE = ("design", "claims")  # pages of facts, whose blocks are no steps to follow
NOT_RUN = ("installs packages", "needs a GPU")
LATENCY = "--iterations", "4", "--rounds", "2"
# What a test adds to commands, so that they do the same in less time, and something is shown to be worth shipping.
QUICKER = {
    "run": (
        *("--set", "evaluate.latency.iterations=4", "--set", "evaluate.latency.warmup_seconds=0.1"),
        *("--set", "require.max_top1_drop=99", "--set", "require.min_speedup=0.001"),
    ),
    "evaluate": LATENCY,
    "benchmark": LATENCY,
}
AUTOMATIC = ("--no-compile",)  # for `--format auto`, which else compiles every format


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `not_run` is the reason in the comment above it."""

    page: str
    language: str
    text: str
    not_run: str | None

    @property
    def commands(self) -> list[str]:
        """The lines of a block for the shell, or the `run` steps of a GitHub workflow, continued lines put together."""
        if self.language == "yaml":
            steps = [step for job in yaml.safe_load(self.text)["jobs"].values() for step in job["steps"]]
            return [step["run"] for step in steps if "run" in step]
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(page: str) -> list[Block]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found = re.finditer(r"(?:<!-- not run: (.*?) -->\n)?^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(page, match[2], match[3], match[1]) for match in found]


def run_shell(command: str, page: str, names: dict[str, str]) -> None:
    """Run one command line as a shell would: MODEL and DATA replaced, `>` into a file."""
    for name, value in names.items():
        command = re.sub(rf"(?<![\w/]){re.escape(name)}\b", value, command)
    words = shlex.split(command, comments=True)
    target = words[words.index(">") + 1] if ">" in words else None
    program, *arguments = words[: words.index(">")] if target else words
    assert program == "vitopt", f"{page}: {command!r} is no command of vitopt; say above its block why it is not run"
    added = QUICKER.get(arguments[0], ()) if "--dry-run" not in arguments else ()
    added += AUTOMATIC if "auto" in arguments else ()
    done = vitopt(*arguments, *added)
    expected = (0, 3, 4) if arguments[0] == "compare" else (0,)
    assert done.exit_code in expected, f"{page}: {command}\n{done.output}\n{done.exception!r}"
    if target:
        Path(target).write_text(done.stdout, encoding="utf-8")


def not_compiled(*_: object) -> NoReturn:
    raise RuntimeError("it takes too long here")


@pytest.fixture(scope="module")
def names(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the pages' words stand for."""
    images = make_images(tmp_path_factory.mktemp("guide") / "shapes", {"train": 10, "test": 10})
    return {"MODEL": str(tiny_checkpoint), "DATA": str(images), "$GITHUB_STEP_SUMMARY": "summary.md"}


@pytest.fixture(scope="module")
def workplace(names: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the recipe and the run of the first page, which the other pages go on from."""
    folder = tmp_path_factory.mktemp("workplace")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        # Compiling takes most of the time, and has tests of its own. What cannot be compiled runs eager.
        patch.setattr(support, "why_not_compile", lambda device: "it takes too long here")
        patch.setattr(compiled.FrozenModel, "__call__", not_compiled)
        patch.setattr(compiled.GraphedModel, "__call__", not_compiled)
        for command in ("vitopt init MODEL DATA > recipe.yaml", "vitopt run recipe.yaml"):
            run_shell(command, "the first page", names)
        yield folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page}.md")  # one is named like a mark
def test_every_command_of_a_page_runs(page: str, names: dict[str, str], workplace: Path) -> None:
    variables: dict[str, object] = {}
    for block in blocks(page):
        if block.not_run is not None:
            continue
        if block.language == "python":
            code = block.text.replace('"MODEL', f'"{names["MODEL"]}').replace('"DATA', f'"{names["DATA"]}')
            exec(compile(code, page, "exec"), variables)
            continue
        for command in block.commands:
            if not (block.language == "yaml" and command.startswith("pip install")):
                run_shell(command, page, names)
    assert Path.cwd() == workplace


def test_the_first_page_ends_with_a_version_to_ship(workplace: Path) -> None:
    assert (workplace / "runs/my-run/export/model.safetensors").is_file()
    assert load_recipe(workplace / "recipe.yaml").exports_best


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page}.md")  # one is named like a mark
def test_only_known_reasons_spare_a_command(page: str) -> None:
    found = blocks(page)
    assert found
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert text.count("<!-- not run") == sum(block.not_run is not None for block in found)
    assert {block.not_run for block in found} <= {None, *NOT_RUN}
    assert {block.language for block in found} <= {"sh", "python", "yaml"}


def test_the_readme_links_each_page_and_every_link_leads_somewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page for page in PAGES if f"(docs/{page}.md)" not in readme] == []
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == {*PAGES, *FIGURES_ASIDE}
    for source in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = source.read_text(encoding="utf-8")
        for target, section in re.findall(r"\]\(([^)#:]+\.md)?(?:#([\w-]+))?\)", text):
            file = source.parent / target if target else source
            assert file.is_file(), f"{source.name} links {target}"
            assert not section or section in sections(file), f"{source.name} links {target}#{section}"


def sections(page: Path) -> set[str]:
    """Names of a page's sections as GitHub links them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
