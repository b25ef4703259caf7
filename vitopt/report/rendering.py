"""Templates of the report room: HTML is escaped, Markdown is not."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from vitopt.report.figures import Plot

templates = Environment(
    loader=PackageLoader("vitopt.report"),
    autoescape=select_autoescape(enabled_extensions=("html",), default=False),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def inlined(plot: Plot) -> dict[str, Any]:
    """A figure for a template of a page: its title, and its SVG as markup."""
    return {"title": plot.title, "svg": Markup(plot.svg)}  # made by us, every name in it escaped
