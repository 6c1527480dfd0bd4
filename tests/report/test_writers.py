"""What people read: bold, marks, escapes, and that no number is lost or invented on the way."""

import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from rush_bench.errors import BadInput
from rush_bench.report.layout import best, lay_out
from rush_bench.report.table import of_frame
from rush_bench.report.tables import table
from rush_bench.report.writers import to_csv


def ones(k, n=20):
    return (np.arange(n) < k).astype(int)


def shown(frame):
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(of_frame(frame))
    return console.export_text()


def test_bold_of_the_published_is_the_papers():
    frame = table([], "paper")
    top = {(frame.at[i, "block"], name): frame.at[i, name] for i, name in best(frame)}
    assert top == {
        ("CIFAR-10", "published_standard"): 87.9,  # 92.2 carries footnote 2 and is not ranked
        ("CIFAR-10", "published_pgd"): 77.8,
        ("CIFAR-10", "published_aa"): 79.5,
        ("CIFAR-100", "published_standard"): 57.1,  # nor is 63.5
        ("CIFAR-100", "published_pgd"): 46.6,
        ("CIFAR-100", "published_aa"): 40.2,
        ("CIFAR-10 -> STL-10", "published_standard"): 73.7,
        ("CIFAR-10 -> STL-10", "published_pgd"): 53.3,
        ("CIFAR-10 -> STL-10", "published_aa"): 55.9,
        ("STL-10 -> STL-10", "published_standard"): 76.7,
        ("STL-10 -> STL-10", "published_pgd"): 64.6,
        ("STL-10 -> STL-10", "published_aa"): 67.0,
    }


def test_measured_are_ranked_among_themselves_on_equal_terms(lab):
    lab.cell("rush@64", "pgd", ones(6), votes=64)
    lab.cell("acl", "pgd", ones(9))
    lab.cell("advcl", "pgd", ones(9))
    lab.cell("rocl", "pgd", ones(10, 10))  # fewer images
    lab.cell("free", "pgd", ones(20), suite="linf8-quick")  # a weaker attack
    frame = table(lab.results(), "paper")
    top = {frame.at[i, "measured_as"] for i, name in best(frame) if name == "measured_pgd"}
    assert top == {"acl", "advcl"}
    plain = table(lab.results())
    assert {plain.at[i, "defense"] for i, _ in best(plain)} == {"acl", "advcl"}


def test_a_pretraining_on_the_same_images_is_ranked_with_none(lab):
    """RUSH beside supervised systems; what comes from other images stands apart."""
    for name, right, before in (
        ("a-rush", 7, "cifar10"),
        ("b-trades", 8, None),
        ("c-simclr", 9, "cifar100"),
        ("d-free", 6, None),
    ):
        lab.cell(name, "pgd", ones(right), pretrain_dataset=before)
    frame = table(lab.results())
    assert frame["defense"].tolist() == ["a-rush", "b-trades", "d-free", "c-simclr"] and best(frame) == {(1, "pgd")}


def test_one_alone_is_not_the_best(lab):
    lab.cell("rush@64", "pgd", ones(6), votes=64)
    assert not [hit for hit in best(table(lab.results(), "paper")) if hit[1].startswith("measured")]


def test_csv_keeps_every_number(lab, tmp_path):
    lab.cell("rush@64", "pgd", ones(7), votes=64)
    for style in ("plain", "paper"):
        frame = table(lab.results(), style)
        to_csv(frame, tmp_path / "table.csv")
        back = pd.read_csv(tmp_path / "table.csv")
        assert list(back) == list(frame)
        numbers = frame.select_dtypes("number").astype(float)
        assert np.allclose(back[list(numbers)].astype(float), numbers.round(2), equal_nan=True, atol=0.006)


@pytest.mark.parametrize("numbers", [{"eps": 2 / 255}, {"ACR": 0.4959, "n": 20}, {"cost": 1234567.25}, {}])
def test_csv_rounds_percentages_alone(numbers, tmp_path):
    """A radius of 2/255 in two decimals would be that of 2.55/255."""
    frame = pd.DataFrame([{"pgd": 100 / 3, "pgd_low": 20.0, "pgd_high": 45.678, **numbers}, {}])
    to_csv(frame, tmp_path / "table.csv")
    head, line, empty = (tmp_path / "table.csv").read_text().splitlines()
    assert head == ",".join(frame) and line.startswith("33.33,20.00,45.68") and not empty.strip(",")
    back = pd.read_csv(tmp_path / "table.csv").iloc[0]
    assert {name: back[name] for name in numbers} == pytest.approx(numbers, rel=1e-9)


def test_csv_keeps_fractions_whole(tmp_path):
    frame = pd.DataFrame({"accuracy": [0.87654], "bank": [1 / 3], "bank_low": [0.25], "bank_high": [1.0]})
    to_csv(frame, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "0.87654,0.3333333333,0.25,1"


def test_markdown_has_blocks_dashes_intervals_and_notes(lab, tmp_path):
    lab.cell("rush@64", "clean", ones(18), votes=64)
    lab.cell("rush@64", "pgd", ones(7), votes=64)
    lab.cell("rush@64", "aa", ones(7), votes=64, chunks_done=1)
    text = of_frame(table(lab.results(), "paper")).to_markdown(tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == text
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### CIFAR-10",
        "### CIFAR-100",
        "### CIFAR-10 -> STL-10",
        "### STL-10<sup>3</sup> -> STL-10",
    ]
    line = next(line for line in text.splitlines() if "I\\_F+" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["**87.9**", "**77.8**", "**79.5**"]
    assert re.fullmatch(r"35\.0 \[\d+\.\d, \d+\.\d\]", cells[7])
    assert "| AA |" not in text  # nothing finished: no column
    assert "rush@64, linf8: aa: 1 of 2 chunks" in text
    assert "Data AUG (Rebuffi et al., 2021)<sup>2</sup>" in text
    for mark in "1234":
        assert f"<sup>{mark}</sup> " in text
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


@pytest.mark.parametrize(
    ("differs", "marks"),
    [
        ([{"settings": {"steps": 2}}, {"settings": {"steps": 9}}], ["run 1", "run 2"]),
        ([{"settings": {"steps": 2}, "seed": 3}, {"settings": {"steps": 9}, "seed": 4}], ["seed 3", "seed 4"]),
        ([{"settings": {"steps": 2}, "repeats": 4}, {"settings": {"steps": 9}, "repeats": 8}], ["K=4", "K=8"]),
        ([{"settings": {"steps": 9}, "suite": "linf8-quick"}, {"settings": {"steps": 2}}], ["", ""]),
    ],
)
def test_rows_of_one_name_and_their_notes_are_told_apart(lab, differs, marks):
    for right, more in zip((7, 3), differs, strict=True):
        pgd = lab.cell("a", "pgd", more.get("repeats", 1) * np.array(ones(right)), **more)
        lab.cell("a", "worst", more.get("repeats", 1) * np.array(ones(right)), of=(pgd,), **{**more, "settings": {}})
    frame = table(lab.results())
    layout = lay_out(frame)
    texts = {f"a ({mark})" if mark else "a" for mark in marks}
    assert {row[0] for row in layout.cells} == texts and frame["defense"].tolist() == ["a", "a"]
    for row, line in zip(layout.cells, frame.to_dict("records"), strict=True):
        assert ("", f"{row[0]}, {line['suite']}: {line['notes']}") in layout.notes and "pgd with steps=" in line["notes"]


@pytest.mark.parametrize(
    ("steps", "notes"),
    [
        ({"a": 2, "b": 2}, ["every row: pgd with steps=2 (usual 20)"]),
        ({"a": 2, "b": 2, "c": 20}, ["a, b, linf8: pgd with steps=2 (usual 20)"]),
        ({"a": 2, "b": 3}, [f"{name}, linf8: pgd with steps={n} (usual 20)" for name, n in (("a", 2), ("b", 3))]),
        ({"a": 2}, ["a, linf8: pgd with steps=2 (usual 20)"]),
    ],
)
def test_a_note_of_several_rows_is_said_once(lab, steps, notes):
    for name, n in steps.items():
        lab.cell(name, "pgd", ones(7), settings={"steps": n})
    assert [text for _, text in lay_out(table(lab.results())).notes if "pgd with" in text] == notes


def test_quick_numbers_are_marked(lab):
    lab.cell("rush@64", "clean", ones(18), votes=64, suite="linf8-quick")
    lab.cell("rush@64", "pgd", ones(7), votes=64, suite="linf8-quick")
    lab.cell("rush@64", "apgd", ones(6), votes=64, suite="linf8-quick")
    layout = lay_out(table(lab.results(), "paper"))
    marked = {layout.columns[k] for (_, k), mark in layout.marks.items() if mark == "q"}
    assert marked == {"measured_pgd"}
    assert any(mark == "q" for mark, _ in layout.notes)
    assert "measured_apgd" in layout.columns
    assert "APGD (quick)" in of_frame(table(lab.results(), "paper")).to_markdown()


def test_columns_of_nothing_are_left_out(lab):
    lab.cell("acl", "pgd", ones(7))
    assert "apgd" not in lay_out(table(lab.results())).columns
    assert "measured_apgd" not in lay_out(table(lab.results(), "paper")).columns


SPECIALS = "my_net&50%#{x}$^~\\<[a]|*"


def test_latex_escapes_and_balances(lab):
    lab.cell(SPECIALS, "pgd", ones(7), recipe=None)
    for style in ("plain", "paper"):
        text = of_frame(table(lab.results(), style)).to_latex()
        name = "my\\_net\\&50\\%\\#\\{x\\}\\$\\textasciicircum{}\\textasciitilde{}\\textbackslash{}$<${[}a]|*"
        assert name in text
        bare = re.sub(r"\\[&%$#_{}\\]", "", "\n".join(line for line in text.splitlines() if not line.startswith("%")))
        assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
        outside = re.sub(r"\$[^$]*\$|%\n|\\label{.*}|\\providecommand.*", "", bare)
        assert not re.search(r"[_^~#%<>]", outside)
        assert text.count("\\begin{") == text.count("\\end{")
        assert text.isascii()
        body = text[text.index("\\toprule") : text.index("\\bottomrule")].replace("\\&", "")
        columns = len(re.search(r"\\begin{tabular}{@{}([lr]+)@{}}", text)[1])
        lines = [line for line in body.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
        assert {line.count("&") for line in lines} == {columns - 1}


def test_latex_headers_are_narrow_and_names_stay_on_a_line(lab):
    lab.cell("a name of some words", "pgd", ones(7))
    lab.cell("b", "square", ones(6), suite="linf8-quick without apgd")
    text = of_frame(table(lab.results())).to_latex()
    assert "\\shortstack[r]{Square on \\\\ the rest}" in text and "\na name of some words & " in text
    assert "\\shortstack[l]{linf8-quick \\\\ without apgd}" in text


def test_latex_has_the_papers_signs():
    text = of_frame(table([], "paper")).to_latex()
    assert "RUSH $\\mathcal{I}_F^+$" in text and "RUSH $\\mathcal{I}_F$" in text
    assert "$\\overline{\\mbox{STL-10}}^{3} \\rightarrow$ STL-10" in text
    assert "\\textbf{87.9}" in text and "\\textbf{92.2}" not in text and "92.2" in text
    assert "Data AUG (Rebuffi et al., 2021)\\textsuperscript{2}" in text
    assert all(rule in text for rule in ("\\toprule", "\\midrule", "\\bottomrule"))


def test_markdown_escapes(lab):
    lab.cell(SPECIALS, "pgd", ones(7), recipe=None)
    assert "my\\_net&50%#{x}$^~\\\\\\<[a]\\|\\*" in of_frame(table(lab.results())).to_markdown()


@pytest.mark.parametrize("style", ["plain", "paper"])
@pytest.mark.parametrize("name", ["odd[red]name", "net[v2]", "net[/]", "[bold]", "net\\", r"net\[v2]", "net:x:"])
def test_rich_shows_what_there_is(lab, style, name):
    facts = {"protocol": name, "architecture": "resnet18", "extra_data": name}
    lab.cell("rush@64", "pgd", ones(7), votes=64, recipe="rush")
    lab.cell(name, "pgd", ones(3), recipe=None, **facts)
    text = shown(table(lab.results(), style))
    assert re.search(r"35\.0[^\n]*( |\n[^\n]*)\[\d", text) and f"{name}, resnet18, {name}" in text
    assert f" {name} " in text.replace("\n", " \n ")
    assert ("77.8" in text) == (style == "paper")


@pytest.mark.parametrize("style", ["plain", "paper"])
@pytest.mark.parametrize("width", [120, 160, 240])
def test_a_terminal_shows_protocol_network_and_extra_data_too(lab, style, width):
    facts = {"protocol": "SLF", "architecture": "resnet18", "extra_data": "100k drawn"}
    for name in ("clean", "pgd", "eot", "aa", "worst"):
        lab.cell("rush@64", name, ones(7), votes=64, recipe="rush", **facts)
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(of_frame(table(lab.results(), style)))
    text = console.export_text()
    here = all(word in text for word in ("SLF,", "resnet18,", "drawn"))  # in their column, or above the table
    assert here or "No room for Protocol, network, extra data" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    assert "rush@64" in text or style == "paper"  # beside the published row of its name


@pytest.mark.parametrize("style", ["plain", "paper"])
def test_no_number_is_folded_whatever_the_width(lab, style):
    for name in ("clean", "pgd", "eot", "aa", "square", "worst"):
        lab.cell("rush-cifar10@64", name, ones(7), votes=64, recipe="rush", repeats=16 if name == "clean" else 1)
        lab.cell("a_long_name_of_a_defence", name, ones(9), recipe=None)
    table_of = of_frame(table(lab.results(), style))
    row = table_of.frame.set_index("measured_as" if style == "paper" else "defense").loc["a_long_name_of_a_defence"]
    for width in (40, 60, 80, 100):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        with console.file:
            console.print(table_of)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert "a_long_name_of_a_defence" in text or style == "paper"
        assert f"{row['measured_worst' if style == 'paper' else 'worst']:.1f}" in text
        numbers = text.partition("Below each number")[0]
        assert not re.search(r"\[\d+\.\d,\s*$|\d\.\s*$", numbers, re.MULTILINE)  # what goes on in the next line
        lacking = [name for name in ("EOT", "AA") if f" {name}" not in text.split("No room")[0]]
        assert all(name in text.partition("No room for")[2] for name in lacking)  # what is left out is named


def test_rows_stand_upright_where_nothing_else_fits(lab):
    lab.cell("a_name_that_leaves_no_room_for_numbers", "worst", ones(9))
    console = Console(width=42, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(of_frame(table(lab.results())))
    assert re.search(r"a_name_that_leaves_no_room_for_numbers\n +Worst +45\.0 \[", console.export_text())
    narrow = Console(width=30)
    with narrow.capture() as shown:
        narrow.print(of_frame(table(lab.results())))
    assert "a_name_that_leaves_no_room_for_numbers" in re.sub(r"\s", "", shown.get())  # folded, not cut


def test_a_printed_table_fits_a_column_and_says_in_its_caption_what_all_rows_share(lab):
    for name, right in (("clean", 18), ("pgd", 7), ("worst", 6)):
        lab.cell("rush@64", name, ones(right), votes=64)
        lab.cell("acl", name, ones(right - 1))
    made = of_frame(table(lab.results()))
    text = made.to_latex()
    assert "resizebox" not in text and "\\begin{table}\n" in text and "tabular}{@{}lrrr@{}}" in text
    assert "cifar10, linf8, K=1, n=20" in re.search(r"\\caption{(.*)}", text)[1]
    assert re.search(r"\\ci{\\mathbf{90\.0}}{\d+\.\d}{\d+\.\d}", text)
    chosen = made.select(["defense", "worst"]).to_latex(caption="Ours, $m=64$.", label="tab:ours")
    assert "Defence & Worst \\\\" in chosen and "\\caption{Ours, $m=64$.}\n\\label{tab:ours}" in chosen
    with pytest.raises(BadInput, match="did you mean 'worst'"):
        made.select(["wurst"])


def test_a_note_on_a_column_goes_with_it(lab):
    for name, right in (("clean", 18), ("pgd", 7), ("square", 6), ("worst", 6)):
        lab.cell("acl", name, ones(right))
    made = of_frame(table(lab.results()))
    assert "Square on the rest: " in made.to_markdown()
    assert "Square on the rest: " in made.select(["defense", "square"]).to_markdown()
    chosen = made.select(["defense", "worst"]).to_markdown()
    assert "Square on the rest: " not in chosen and "Accuracy in percent" in chosen


def test_a_notebook_shows_the_same_table(lab):
    lab.cell("<b>&", "pgd", ones(7))
    made = of_frame(table(lab.results()))
    page = made._repr_html_()
    assert "&lt;b&gt;&amp;" in page and "35.0 [" in page and page.count("<tr>") == 2 and len(made) == 1
    paper = of_frame(table(lab.results(), "paper"))._repr_html_()
    assert "CIFAR-10</th>" in paper and "CIFAR-100</th>" not in paper  # blocks without a measurement


@pytest.mark.parametrize("style", ["plain", "paper"])
def test_writers_take_an_empty_table(style, tmp_path):
    frame = table([], style)
    to_csv(frame, tmp_path / "t.csv")
    assert of_frame(frame).to_markdown() and of_frame(frame).to_latex() and shown(frame)
