"""Figures as small SVG that fits a light and a dark page, and as PNG for documents."""

import io
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
from matplotlib.figure import Figure

INK = "#1f2328"  # text and axes; in SVG it becomes the colour of the text around the figure
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_NAMESPACE = "http://www.w3.org/2000/svg"
_LINKS = "http://www.w3.org/1999/xlink"
_LINK = f"{{{_LINKS}}}href"
_UNWANTED = {f"{{{_NAMESPACE}}}metadata", f"{{{_NAMESPACE}}}style"}
ElementTree.register_namespace("", _NAMESPACE)
ElementTree.register_namespace("xlink", _LINKS)


def svg_of(figure: Figure, name: str, description: str) -> str:
    """The figure as SVG that stands alone or inside a page, without a size of its own.

    Its ids begin with `name`, so that figures on one page do not clash; `description` is read to those who
    cannot see it. The same figure gives the same text.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    # A style element would reach all of the page, and metadata tells nothing about the figure.
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in _UNWANTED]:
            parent.remove(child)
    elements = list(root.iter())
    used = {target for element in elements for value in element.attrib.values() for target in _targets(value)}
    for element in elements:
        own = element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            element.set(key, f"#{name}-{value[1:]}" if key == _LINK else _compact(value, name))
        if own in used:
            element.set("id", f"{name}-{own}")
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    style = f"stroke-linejoin: round; font-family: {_FONTS}"
    root.attrib.update({"role": "img", "aria-label": description, "style": style})
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def png_of(figure: Figure) -> bytes:
    """The figure as PNG on white, 144 pixels per inch. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _targets(value: str) -> list[str]:
    """Ids that an attribute refers to."""
    return re.findall(r"(?:^|url\()#([^)]+)", value)


def _compact(value: str, name: str) -> str:
    """An attribute with short numbers and the page's colour and fonts; references carry the figure's name."""
    value = value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    value = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
    # matplotlib before 3.11 writes the shorthand; the family is given once, at the root.
    value = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", value)
    return re.sub(r"font-family: [^;]*;? ?|rotate\(-0 [^)]*\)", "", value)
