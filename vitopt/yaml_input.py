"""YAML text from outside, as plain data of bounded size: what a recipe may be written in, and no more.

YAML can multiply a few lines into gigabytes (aliases of aliases), name Python objects, and say a key twice.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 20_000  # scalars, lists and mappings, counting those that aliases repeat each time
_MAX_DIGITS = 40


class InputError(Exception):
    """The text is not YAML, or says what a recipe cannot mean; one line."""


def read_text(path: Path) -> str:
    """The content of a UTF-8 file.

    Raises:
        InputError: it is missing, a pipe or a device, too long, or no UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError("it is a folder" if path.is_dir() else "it is a pipe or a device, not a file")
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"it is longer than {MAX_BYTES:,} bytes")
        return content.decode()
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        raise InputError(getattr(error, "strerror", None) or str(error)) from error


def parse(text: str) -> Any:
    """The plain data that YAML text stands for: mappings, lists, strings, numbers, booleans, null.

    Raises:
        InputError: not valid YAML, a key twice, a tag such as `!!python/object`, a number of more than 40 characters,
            or more nodes, depth or text than a recipe can need.
    """
    if len(text) > MAX_BYTES:
        raise InputError(f"it is longer than {MAX_BYTES:,} characters")
    try:
        _require_bounded(text)
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        where = f" in line {place.line + 1}, column {place.column + 1}" if place else ""
        raise InputError(", ".join(filter(None, (error.context, error.problem))) + where) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(" ".join(str(error).split())) from error


def _require_bounded(text: str) -> None:
    """Count depth and nodes from the events of the parser, before anything is built of them."""
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and how many nodes there were before it
    sizes: dict[str, int] = {}  # anchor -> its nodes, what aliases within it repeat included
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise InputError(f"alias *{event.anchor} in line {line} names no complete value before it")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            tag = getattr(event, "tag", None)
            if tag not in (None, "!"):
                raise InputError(f"tag {tag} in line {line}: a recipe has plain values only, leave the tag out")
            nodes += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, nodes - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_nodes) > MAX_DEPTH:
            raise InputError(f"it is nested more than {MAX_DEPTH} levels deep in line {line}")
        if nodes > MAX_NODES:
            raise InputError(
                f"it has more than {MAX_NODES:,} values by line {line}, counting those that aliases repeat"
            )


class _PlainLoader(yaml.SafeLoader):
    """Builds plain data; dates stay strings, and a key that appears twice is a mistake."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (yaml's own attribute)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()  # before `<<` brings in keys of another mapping, which may be said anew
        for key, _ in node.value:
            if key.value == "<<":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > _MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {_MAX_DIGITS} characters", node.start_mark
            )
        if node.tag.endswith(":int"):
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _PlainLoader.construct_number)
