"""matplotlib's SVG made part of a page: it follows light and dark, its ids are its own, and its markers say their values."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from markupsafe import Markup

from rush_bench.report.figures import TIPS

REACH = 7.0  # points around a marker that count as pointing at it
REFERS = ("href", "clip-path")


def inline(draw: Callable[[Path], Path | None], prefix: str) -> Markup | None:
    """The SVG that `draw` writes to the path it is given, ready to stand in HTML; None where there is nothing to draw.

    `prefix` begins each of its ids, so that several figures can stand on one page.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = draw(Path(folder) / "figure.svg")
        return None if path is None else Markup(page_svg(path.read_text(encoding="utf-8"), prefix))


def page_svg(text: str, prefix: str) -> str:
    """A file of matplotlib's as an element of HTML.

    Colours become `var(--c-rrggbb, #rrggbb)`, which the page's dark style may replace; a marker with words (`figures.tips`)
    becomes a group of class `tip` with a `title`, and a circle wide enough to point at. The first of a figure is a tab stop,
    from which the page's script leads to the others by the arrow keys.
    """
    root = ElementTree.fromstring(text)
    for element in root.iter():  # HTML knows what svg is: no name space, hence no address
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)
    for element in list(root.iter()):
        _titles_from_ids(element)
    for number, tip in enumerate(root.iterfind(".//*[@class='tip']")):
        tip.attrib |= {"tabindex": "-1" if number else "0", "role": "img"}
    needed = {found for e in root.iter() for name in REFERS for found in re.findall(r"#(\w+)", e.get(name, ""))}
    for element in root.iter():
        if (own := element.attrib.pop("id", None)) in needed:
            element.set("id", f"{prefix}-{own}")
        for name in REFERS:
            if name in element.attrib:
                element.set(name, element.attrib[name].replace("#", f"#{prefix}-"))
        if "style" in element.attrib:
            style = re.sub(r"font-family:[^;]*;?\s*", "", element.attrib["style"])  # the page's
            element.set("style", re.sub(r"#([0-9a-f]{6})\b", r"var(--c-\1, #\1)", style))
    width = float(root.attrib["viewBox"].split()[2])
    root.attrib = {"viewBox": root.attrib["viewBox"], "style": f"--width: {width:g}", "role": "group"}
    return ElementTree.tostring(root, encoding="unicode")


def _titles_from_ids(group: Element) -> None:
    """Turn the words in a group's id into titles of what it draws."""
    texts = group.get("id", "").split(TIPS)[1:]
    if not texts:
        return
    del group.attrib["id"]
    markers = [(parent, mark) for parent in group.iter() for mark in parent if mark.tag == "use"]
    if len(markers) == len(texts):
        for (parent, mark), text in zip(markers, texts, strict=True):
            tip = Element("g")
            parent[list(parent).index(mark)] = tip
            at = {"cx": mark.get("x", "0"), "cy": mark.get("y", "0"), "r": f"{REACH:g}"}
            tip.extend([mark, Element("circle", {**at, "style": "fill: none; pointer-events: all"})])
            _title(tip, text)
    else:
        _title(group, "; ".join(texts))


def _title(group: Element, text: str) -> None:
    group.set("class", "tip")
    title = Element("title")
    title.text = text
    group.insert(0, title)
