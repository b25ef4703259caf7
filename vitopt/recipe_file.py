"""Recipe files: YAML in, a validated recipe out, every mistake reported at once."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from vitopt import yaml_input
from vitopt.errors import RecipeError
from vitopt.recipe import Recipe, Spec, data_from_string, suggest

S = TypeVar("S", bound=Spec)

_SHOWN = 50  # mistakes of one file


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    `overrides` are `KEY=VALUE` strings such as `finetune.epochs=1` or `variants.0.format=nf4`; values are
    YAML. `${NAME}` and `${NAME:-default}` in strings are taken from the environment.

    Raises:
        RecipeError: the file is missing, is not YAML, or breaks a rule; all mistakes are listed.
    """
    try:
        text = yaml_input.read_text(path)
    except yaml_input.InputError as error:
        raise RecipeError(f"cannot read recipe {path}: {error} (`vitopt init` prints one to start from)") from error
    try:
        content = yaml_input.parse(text)
    except yaml_input.InputError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a mapping of keys such as name, model, data and variants")
    for override in overrides:
        _apply_override(content, override)
    return validate(Recipe, _expand(content), where=str(path))


def dump_yaml(spec: Spec, *, defaults: bool = True) -> str:
    """The resolved spec as YAML that loads back to an equal spec; `defaults` false leaves default values out."""
    content = spec.model_dump(mode="json", exclude_defaults=not defaults)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def validate(model: type[S], content: Any, where: str) -> S:
    """Build `model` from plain data, or raise one RecipeError with a line for every mistake."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A tuple whose items are wrong is also called too short by pydantic; the items say it better.
        inner = {mistake["loc"][:-depth] for mistake in errors for depth in range(1, len(mistake["loc"]))}
        errors = [m for m in errors if m["type"] != "too_short" or m["loc"] not in inner]
        count = "1 mistake" if len(errors) == 1 else f"{len(errors):,} mistakes"
        count += f", first {_SHOWN}" if len(errors) > _SHOWN else ""
        lines = "\n".join(f"  {_describe(model, mistake)}" for mistake in errors[:_SHOWN])
        raise RecipeError(f"{where}: {count}\n{lines}") from error


def _describe(model: type[Spec], mistake: Any) -> str:
    where = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        *parents, key = mistake["loc"]
        known = list(section_at(model, parents).model_fields)
        return f"{where}: unknown key; {suggest(str(key), known)}"
    message = mistake["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not where:
        return message  # a rule of the whole
    if mistake["type"] in ("value_error", "missing"):
        return f"{where}: {message}"
    return f"{where}: {message}, not {mistake['input']!r}"


def section_at(model: type[Spec], location: Sequence[int | str]) -> type[Spec]:
    """The spec class that a pydantic error location points into."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = spec_in(model.model_fields[part].annotation) or model
    return model


def spec_in(annotation: Any) -> type[Spec] | None:
    """The spec class in an annotation such as `Annotated[DataSpec | None, ...]`; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return annotation
    return next((spec for part in get_args(annotation) if (spec := spec_in(part))), None)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r} must look like KEY=VALUE, as in --set finetune.epochs=1")
    target: Any = content
    for depth, part in enumerate(parts[:-1], start=1):
        reached = ".".join(parts[:depth])
        place = _place(target, part, override, reached)
        old = target.get(place) if isinstance(target, dict) else target[place]
        section = _section_for_keys(old, override, reached)
        target[place] = section
        target = section
    try:
        parsed = yaml_input.parse(value)
    except yaml_input.InputError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    target[_place(target, parts[-1], override, key)] = parsed


def _place(target: Any, part: str, override: str, reached: str) -> str | int:
    """`part` as a key of a mapping, which may be new, or as an index of a list, which must exist."""
    if isinstance(target, dict):
        return part
    if not part.isdecimal() or int(part) >= len(target):
        there = f"use an index from 0 to {len(target) - 1}" if target else "the list is empty"
        raise RecipeError(f"--set {override!r}: {reached} is not there; {there}")
    return int(part)


def _section_for_keys(value: Any, override: str, reached: str) -> Any:
    # `data: digits` and an absent or null section both become a mapping that can take the key.
    section = data_from_string(value) if reached == "data" else value
    if section is None:
        return {}
    if not isinstance(section, dict | list):
        raise RecipeError(f"--set {override!r}: {reached} is {value!r}, which has no keys; set {reached} itself")
    return section


def _expand(value: Any) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in all strings of plain data."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", _environment_value, value)
    return value


def _environment_value(match: re.Match[str]) -> str:
    name, default = match.groups()
    value = os.environ.get(name)
    if default is not None:
        # As in a shell, the default also stands in for an empty value.
        return value or default
    if value is None:
        raise RecipeError(f"the recipe uses ${{{name}}}, which is not set: run `export {name}=...` first")
    return value
