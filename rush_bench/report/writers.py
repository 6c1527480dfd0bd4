"""Layouts as text for files and for a notebook: Markdown, LaTeX (booktabs), HTML; and a frame as CSV."""

import html
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from rush_bench.files import write_text
from rush_bench.report.layout import BOUND, DASH, UNLABELLED, Layout, flush_left, folded, header, lift_shared_columns

WIDE, CROWDED = 7, 12  # columns; so many stand across both columns of a page, so many in the smallest letters
HEAD, WORDS = 9, 16  # letters of a line of a header, and of words in a cell
# a number above its interval, which a narrow column has room for; a paper may define it otherwise before
INTERVAL = "\\providecommand{\\ci}[3]{$#1_{\\,#2}^{\\,#3}$}"
ENDS = ("", "_low", "_high", "_sd")
COSTS = ("training_passes", "training_images", "training_seconds")
NUMBER = re.compile(r"(≥ )?([\d.]+)( ± [\d.]+)? \[([\d.]+), ([\d.]+)\]")


def to_csv(frame: pd.DataFrame, path: Path) -> None:
    """All columns, empty where there is none: percentages and costs of training to two decimals, others to ten digits."""
    rounded = {name: frame[name].map("{:.2f}".format, na_action="ignore") for name in _to_two_decimals(frame)}
    write_text(Path(path), frame.assign(**rounded).to_csv(index=False, float_format="%.10g"))


def _to_two_decimals(frame: pd.DataFrame) -> list[str]:
    """What stands beside its interval, with it, where it is percent; a frame whose intervals are all of fractions has none."""
    shares = [name for name in frame if f"{name}_low" in frame]
    percent = bool((frame[shares].astype(float).abs() > 1).any(axis=None))
    chosen = {f"{name}{end}" for name in shares for end in ENDS if percent} | {*COSTS}
    return [name for name in frame.select_dtypes("float") if name in chosen]


def markdown(layout: Layout) -> str:
    """GitHub Markdown, a table per block."""
    head = "| " + " | ".join(_markdown(header(name)) for name in layout.columns) + " |"
    rule = "|" + "|".join("---" if left else "---:" for left in flush_left(layout)) + "|"
    lines = []
    for title, span in layout.blocks:
        marked = "STL-10<sup>3</sup> -> STL-10" if title == UNLABELLED else _markdown(title)
        lines += [f"### {marked}", ""] if title else []
        lines += [head, rule]
        lines += ["| " + " | ".join(cells_of(layout, i, _markdown, "**{}**", "<sup>{}</sup>")) + " |" for i in span]
        lines.append("")
    lines += [f"<sup>{mark}</sup> {_markdown(text)}  " if mark else f"{_markdown(text)}  " for mark, text in layout.notes]
    return "\n".join(lines).rstrip() + "\n"


def latex(layout: Layout, caption: str | None = None, label: str | None = None, about: str = "") -> str:
    """A LaTeX table that fits a column of a two-column paper, or with many columns the page; needs the package booktabs.

    `caption` and `label` are LaTeX, as given; without a caption it is what the numbers are `about`. The interval stands beside
    its number in small digits, by the macro `\\ci`.
    """
    layout, _ = lift_shared_columns(layout)
    count, floating = len(layout.columns), "table*" if len(layout.columns) >= WIDE else "table"
    sides = "".join("l" if left else "r" for left in flush_left(layout))
    caption_text = caption or _latex("Accuracy in percent" + (f": {about}." if about else "."))
    lines = ["% needs \\usepackage{booktabs}", INTERVAL, f"\\begin{{{floating}}}", "\\centering"]
    lines += [f"\\caption{{{caption_text}}}", f"\\label{{{label or 'tab:rush-bench'}}}"]
    letters = "\\footnotesize" if count < CROWDED else "\\scriptsize"
    lines += [f"{letters}\\setlength{{\\tabcolsep}}{{2pt}}", f"\\begin{{tabular}}{{@{{}}{sides}@{{}}}}", "\\toprule"]
    lines += [
        " & ".join(_stacked(header(name), HEAD, side) for name, side in zip(layout.columns, sides, strict=True)) + " \\\\"
    ]
    for title, span in layout.blocks:
        lines.append("\\midrule")
        if title:
            lines += [f"\\multicolumn{{{count}}}{{@{{}}l}}{{\\emph{{{_latex_title(title)}}}}} \\\\"]
        lines += [" & ".join(_latex_row(layout, i)) + " \\\\" for i in span]
    lines += ["\\bottomrule", "\\end{tabular}", "", "\\smallskip\\scriptsize\\raggedright"]
    for mark, text in layout.notes:
        lines.append((f"\\textsuperscript{{{_latex(mark)}}} " if mark else "") + _latex(text) + "\\par")
    return "\n".join([*lines, f"\\end{{{floating}}}"]) + "\n"


def to_html(layout: Layout) -> str:
    """A bare HTML table with its notes, for a notebook."""
    layout, shared = lift_shared_columns(layout)
    lines = [f"<p>{html.escape(shared)}</p>" if shared else "", "<table>", "<thead><tr>"]
    lines += [f"<th>{html.escape(header(name))}</th>" for name in layout.columns]
    lines.append("</tr></thead><tbody>")
    for title, span in layout.blocks:
        if title:
            lines.append(f'<tr><th colspan="{len(layout.columns)}">{html.escape(title)}</th></tr>')
        for i in span:
            cells = cells_of(layout, i, html.escape, "<b>{}</b>", "<sup>{}</sup>")
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    lines.append("</tbody></table>")
    notes = (f"<sup>{mark}</sup> {html.escape(text)}" if mark else html.escape(text) for mark, text in layout.notes)
    return "\n".join([*lines, "<p><small>" + "<br>".join(notes) + "</small></p>"])


def cells_of(layout: Layout, i: int, escape: Callable[[str], str], bold: str, mark: str) -> list[str]:
    """A row as text: the best in the form of `bold`, footnotes in that of `mark`."""
    lines = []
    for k, text in enumerate(layout.cells[i]):
        text = escape(text)
        if (i, k) in layout.bold:  # the number, not its interval
            number = text.split()[0]
            text = bold.format(number) + text[len(number) :]
        lines.append(text + (mark.format(layout.marks[i, k]) if (i, k) in layout.marks else ""))
    return lines


def _latex_row(layout: Layout, i: int) -> list[str]:
    parts = []
    for k, text in enumerate(layout.cells[i]):
        bold, found = (i, k) in layout.bold, NUMBER.fullmatch(text)
        if found:
            least, number, spread, low, high = found.groups()
            number = f"\\mathbf{{{number}}}" if bold else number
            number = ("\\geq " if least else "") + number + (spread or "").replace(" ± ", " \\pm ")
            text = f"\\ci{{{number}}}{{{low}}}{{{high}}}"
        elif bold:
            text = f"\\textbf{{{_latex(text)}}}"
        else:
            text = _stacked(text, WORDS, "l") if k else _latex(text)  # a row's name stays on a line
        parts.append(text + (f"\\textsuperscript{{{_latex(layout.marks[i, k])}}}" if (i, k) in layout.marks else ""))
    return parts


def _stacked(text: str, width: int, side: str) -> str:
    """Words one below the other where a line of them is wider than so many letters; needs no package."""
    lines = " \\\\ ".join(_latex(line) for line in folded(text, width).split("\n"))
    return lines if lines == _latex(text) else f"\\shortstack[{side}]{{{lines}}}"


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<])", r"\\\1", text)


_LATEX = {
    "[": "{[}",
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    DASH: "--",
    "→": "$\\rightarrow$",
    "±": "$\\pm$",
    "≥": "$\\geq$",
    BOUND: "$\\dagger$",
}


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
    escaped = re.sub(r"I\\_F\+(?=\s|$)", "$\\\\mathcal{I}_F^+$", escaped)
    escaped = re.sub(r"I\\_F(?=\s|$)", "$\\\\mathcal{I}_F$", escaped)
    escaped = re.sub(r"\b(?:l-inf|linf) ", "$\\\\ell_\\\\infty$ ", escaped)
    return escaped.replace("->", "$\\rightarrow$").replace("<", "$<$").replace(">", "$>$")


def _latex_title(title: str) -> str:
    if title == UNLABELLED:  # as in the paper: the bar marks the unlabelled split
        return "$\\overline{\\mbox{STL-10}}^{3} \\rightarrow$ STL-10"
    return _latex(title)
