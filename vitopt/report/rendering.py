"""Templates of the report room: HTML is escaped, Markdown is not."""

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from vitopt.report.table import markdown, markdown_text

templates = Environment(
    loader=PackageLoader("vitopt.report"),
    autoescape=select_autoescape(enabled_extensions=("html",), default=False),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
templates.filters |= {"text": markdown_text, "markdown": markdown}
