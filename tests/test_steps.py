"""Steps of a variant as a recipe names them."""

import pkgutil
from typing import Any

import pytest

from vitopt.errors import RecipeError
from vitopt.recipe import FinetuneSpec, Recipe
from vitopt.recipe_file import dump_yaml, load_recipe, validate
from vitopt.steps import STEPS


def content(*steps: Any, **changes: Any) -> dict[str, Any]:
    variants = [{"name": "a", "format": "fp32"}, {"name": "b", "format": "nf4", "steps": list(steps)}]
    return {"name": "run", "model": "some/model", "data": "digits", "variants": variants} | changes


def recipe(*steps: Any, **changes: Any) -> Recipe:
    return validate(Recipe, content(*steps, **changes), where="r")


@pytest.mark.parametrize("written", ["finetune", {"finetune": None}, {"finetune": {}}])
def test_a_name_alone_takes_the_defaults(written: Any) -> None:
    (step,) = recipe(written).variants[1].steps
    assert (step.name, step.settings) == ("finetune", FinetuneSpec())


def test_a_dumped_recipe_loads_back(tmp_path: Any) -> None:
    asked = recipe({"finetune": {"method": "full", "epochs": 1}}, "finetune")
    path = tmp_path / "r.yaml"
    path.write_text(dump_yaml(asked))
    assert load_recipe(path) == asked
    changed = load_recipe(path, ["variants.1.steps.0.finetune.epochs=2"])
    assert changed.variants[1].steps[0].settings.epochs == 2


@pytest.mark.parametrize(
    ("step", "where", "words"),
    [
        ({"finetun": {}}, "variants.1.steps.0.finetun", "did you mean 'finetune'"),
        ("melt", "variants.1.steps.0.melt", "known: finetune"),
        ("prune", "variants.1.steps.0.prune", "nothing is removed"),
        ({"finetune": {"rnak": 4}}, "variants.1.steps.0.finetune.rnak", "did you mean 'rank'"),
        ({"finetune": {"epochs": 0}}, "variants.1.steps.0.finetune.epochs", "greater than 0"),
        ({"finetune": {"method": "full", "rank": 4}}, "variants.1.steps.0.finetune", "`rank`"),
        ({}, "variants.1.steps.0", "finetune"),
    ],
)
def test_a_mistake_is_told_with_its_place(step: Any, where: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(step)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.strip().startswith(f"{where}: ") and words in line


def test_a_step_that_learns_needs_data() -> None:
    with pytest.raises(RecipeError, match=r"step finetune of b needs `data`"):
        recipe("finetune", data=None)


def test_the_training_split_may_be_named_for_steps_alone() -> None:
    data = {"source": "digits", "train": "validation"}
    assert recipe("finetune", data=data).trains
    with pytest.raises(RecipeError, match="train"):
        recipe(data=data)


def test_steps_are_named_by_all_that_was_done_so_far() -> None:
    def names(*steps: Any) -> list[str]:
        return recipe(*steps).variants[1].step_names

    first, second = names({"finetune": {"epochs": 1}}, "finetune")
    assert first.startswith("finetune-") and names({"finetune": {"epochs": 1}}) == [first]
    assert len({first, second, *names("finetune"), *names({"finetune": {"epochs": 2}})}) == 4
    assert names("finetune") == names({"finetune": {"rank": FinetuneSpec().rank}})


@pytest.mark.parametrize("name", STEPS)
def test_every_kind_has_a_function_and_words(name: str) -> None:
    assert callable(pkgutil.resolve_name(STEPS[name].function))
    needed = {"prune": {"depth": 1}}.get(name, {})
    assert STEPS[name].spec.model_validate(needed).words  # type: ignore[attr-defined]
