"""Keyword arguments of Python functions from the fields of recipe sections."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vitopt.errors import RecipeError
from vitopt.recipe import Spec
from vitopt.recipe_file import validate

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=Spec)


def takes(spec: type[Spec], unused: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """Show the fields of `spec` but `unused` as keyword arguments, to `help` and to the completion of a notebook."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        shown = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=of.get_default(call_default_factory=True),
                annotation=of.annotation,
            )
            for name, of in spec.model_fields.items()
            if name not in signature.parameters and name not in (unused or {})
        ]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate


def validated(
    spec: type[S], function: str, options: Mapping[str, Any], unused: Mapping[str, str] | None = None, **own: Any
) -> S:
    """The spec of a function's keyword arguments and of its `own` values.

    Raises:
        RecipeError: keywords that do not exist or have wrong values, all of them; or one that is `unused`, and why.
    """
    for key, why in (unused or {}).items():
        if key in options:
            raise RecipeError(f"{function}: {key}: {why}")
    return validate(spec, dict(options) | own, where=function)


def part(options: Spec, spec: type[S]) -> S:
    """Those of the options that are fields of `spec`."""
    return spec(**{name: getattr(options, name) for name in spec.model_fields})
