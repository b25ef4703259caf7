"""Options of commands from the fields of recipe sections, so that a default and its help text stand in one place."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from pydantic import create_model
from pydantic.fields import FieldInfo

from vitopt.errors import RecipeError
from vitopt.recipe import Spec
from vitopt.recipe_file import section_at, spec_in, validate


@dataclass(frozen=True)
class Fields:
    """Which fields of a spec become options of a command; without it, all do.

    `paths`: the fields in the order of the help, all if empty; a dot leads into a section of the spec. `named`: path ->
    option, where that is not the field's name. `help`: path -> text, where a command says it more exactly. `unset`:
    paths that show no default, because they have none unless another option is given.
    """

    paths: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    help: Mapping[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()


def calibration_fields(
    help: str = "calibration images: the train split, or DATA:SPLIT; never your test images",
) -> Fields:
    """Of a `DataSpec` whose images calibrate; how many is another spec's field."""
    return Fields(
        ("source", "root", "labels", "group_column", "skip_bad_images"),
        named={"source": "data", "root": "data_root"},
        help={"source": help},
    )


def given(context: typer.Context) -> set[str]:
    """Parameters that stand on the command line."""
    return {name for name in context.params if context.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]


def refuse(context: typer.Context, *names: str, because: str) -> None:
    """Refuse those of the options that stand on the command line: they would do nothing.

    Raises:
        RecipeError: at least one of them is there.
    """
    useless = [name for name in names if name in given(context)]
    if useless:
        written = (f"--{'no-' if context.params[name] is False else ''}{name.replace('_', '-')}" for name in useless)
        raise RecipeError(f"{', '.join(written)}: {because}")


def from_fields(check: Callable[[typer.Context], None] = lambda context: None) -> Callable[..., Callable[..., None]]:
    """Let typer see each parameter that is annotated with a spec as options, one for each of its fields.

    Only values that stand on the command line reach the specs (`model_fields_set`), and all are validated together. A
    spec that may be None is None without its required fields. `check` runs first; it refuses what would do nothing.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        sections: dict[str, _Section] = {}
        for name, parameter in inspect.signature(command).parameters.items():
            if spec := spec_in(hints[name]):
                sections[name] = _Section(spec, hints[name])
                parameters += sections[name].parameters()
            else:
                parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
        types: dict[str, Any] = {name: (section.annotation, ...) for name, section in sections.items()}
        arguments = create_model("Arguments", __base__=Spec, **types)

        @functools.wraps(command)
        def with_options(context: typer.Context, **values: Any) -> None:
            check(context)
            asked = given(context)
            content = {name: section.content(values, asked) for name, section in sections.items()}
            command(**values, **dict(validate(arguments, content, where="arguments")))

        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


class _Section:
    """A parameter of a command that is a spec, and its options."""

    def __init__(self, spec: type[Spec], annotation: Any) -> None:
        self.annotation = annotation
        self._wanted = next((part for part in get_args(annotation) if isinstance(part, Fields)), Fields())
        paths = self._wanted.paths or tuple(spec.model_fields)
        self._options = {self._wanted.named.get(path, path.rpartition(".")[2]): path for path in paths}
        self._fields = {path: _field(spec, path) for path in paths}
        self._types = {path: _plain_type(spec, path) for path in paths}
        self._optional = type(None) in get_args(get_args(annotation)[0] if get_args(annotation) else annotation)

    def parameters(self) -> list[Parameter]:
        """What typer makes options of."""
        return [self._parameter(option, path) for option, path in self._options.items()]

    def _parameter(self, option: str, path: str) -> Parameter:
        of = self._fields[path]
        kind, default = _type_and_default(of, self._types[path])
        if self._optional and of.is_required():
            kind, default = kind | None, None
        if path in self._wanted.unset:
            default = None
        dashed = option.replace("_", "-")
        flags = f"--{dashed}/--no-{dashed}" if default is True else f"--{dashed}"
        text = self._wanted.help.get(path) or of.description or ""
        shown = typer.Option(flags, help=text[:1].upper() + text[1:] + "." if text else None)
        return Parameter(option, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown])

    def content(self, values: dict[str, Any], asked: set[str]) -> dict[str, Any] | None:
        """Take the options out of `values`: those that are `asked` for, as a recipe would hold them."""
        content: dict[str, Any] = {}
        for option, path in self._options.items():
            value = values.pop(option)
            if option in asked:
                *parents, name = path.split(".")
                place = content
                for parent in parents:
                    place = place.setdefault(parent, {})
                is_list = get_origin(self._fields[path].annotation) is tuple and isinstance(value, str)
                place[name] = value.split(",") if is_list else value
        required = {path for path, of in self._fields.items() if of.is_required()}
        return None if self._optional and not required <= set(content) else content


def _field(spec: type[Spec], path: str) -> FieldInfo:
    *parents, name = path.split(".")
    return section_at(spec, parents).model_fields[name]


def _plain_type(spec: type[Spec], path: str) -> Any:
    """The field's type without its bounds, which pydantic checks and typer does not know."""
    *parents, name = path.split(".")
    return get_type_hints(section_at(spec, parents))[name]


def _type_and_default(of: FieldInfo, kind: Any) -> tuple[Any, Any]:
    """What typer asks for: texts can be repeated, numbers are one text like 1,8,32."""
    default: Any = Parameter.empty if of.is_required() else of.get_default(call_default_factory=True)
    if get_origin(kind) is not tuple:
        return kind, default
    texts = get_args(kind)[0] is str
    if default is not Parameter.empty:
        default = list(default) if texts else ",".join(map(str, default))
    return list[str] if texts else str, default
