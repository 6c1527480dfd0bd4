"""Figures: PNGs of the size stated, the same bytes each time, every line and chance level in its place."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from rush_bench.errors import BadInput
from rush_bench.report import figures
from rush_bench.report.figures import BOUND, DPI, TIPS, UPPER, accuracy_against_eps, accuracy_by_defence, image_pairs
from rush_bench.report.rows import rows


def ones(k, n=20):
    return (np.arange(n) < k).astype(int)


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were when saved."""
    kept: list[Figure] = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    return kept


def fill(lab):
    for defense, votes, clean, points in (("simclr", 0, 19, {8: 10, 25.5: 1}), ("rush@64", 64, 18, {8: 15, 25.5: 6})):
        for k, right in points.items():
            suite = f"linf{k}-quick"
            lab.cell(defense, "clean", ones(clean), votes=votes, suite=suite)
            lab.cell(defense, "pgd", ones(right), votes=votes, suite=suite, eps=k / 255)
            lab.cell(defense, "apgd", ones(right - 1), votes=votes, suite=suite, eps=k / 255)


def test_accuracy_against_eps(lab, tmp_path, drawn):
    fill(lab)
    path = accuracy_against_eps(lab.results(), tmp_path / "robust.png")
    assert png_size(path) == (round((3.3 * 2 + 0.6) * DPI), round((3.1 + 0.9) * DPI))
    panels = drawn[0].axes
    assert [panel.get_title().split()[0] for panel in panels] == ["PGD", "APGD"]
    assert panels[0].get_ylabel().split("\n")[0] == "cifar10, l-inf, n=20 (quick suite)"
    lines = {bars.get_label(): bars.lines[0].get_xydata() for bars in panels[0].containers}
    assert np.allclose(lines["simclr"], [(0, 95), (8, 50), (25.5, 5)])
    assert np.allclose(lines["rush@64"], [(0, 90), (8, 75), (25.5, 30)])
    assert any(np.allclose(line.get_ydata(), 25) for line in panels[0].lines)  # chance, four classes
    first = path.read_bytes()
    assert accuracy_against_eps(lab.results(), path).read_bytes() == first


def test_lines_never_join_what_differs(lab, tmp_path, drawn):
    lab.cell("acl", "pgd", ones(10))
    lab.cell("acl", "pgd", ones(8, 40), eps=4 / 255, suite="linf4")
    lab.cell("acl", "aa", ones(8), chunks_done=1)
    accuracy_against_eps(lab.results(), tmp_path / "a.png")
    (panel,) = drawn[0].axes
    assert {bars.get_label() for bars in panel.containers} == {"acl (n=20)", "acl (n=40)"}


def lines_of(panel):
    return {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in panel.containers}


def test_other_settings_are_lines_of_their_own(lab, tmp_path, drawn):
    """The usual ones at two eps are one line, which other settings at one of these do not touch."""
    usual = {"steps": 10, "step": 0.25}
    lab.cell("acl", "clean", ones(20), suite="linf4-quick")
    lab.cell("acl", "pgd", ones(12), eps=4 / 255, suite="linf4-quick", settings=usual)
    for right, settings in ((6, usual), (18, {"steps": 2, "step": 0.1})):
        lab.cell("acl", "pgd", ones(right), suite="linf8-quick", settings=settings)
    accuracy_against_eps(lab.results(), tmp_path / "a.png")
    (panel,) = drawn[0].axes
    other = "acl (pgd with step=0.1 (usual 0.25), steps=2 (usual 10))"
    assert lines_of(panel) == {"acl": [[0, 100], [4, 60], [8, 30]], other: [[8, 90]]}
    accuracy_by_defence([row for row in rows(lab.results()) if row.threat_text == "linf 8/255"], tmp_path / "b.png")
    assert [tick.get_text().replace("\n", " ") for tick in drawn[1].axes[0].get_yticklabels()] == ["acl", other]


@pytest.mark.parametrize(
    "first, second, at_first, at_second, names",
    [
        ("linf4-quick", "linf8-quick without square", 4, 8, {"acl", "acl (without square)"}),
        ("linf4-quick", "linf8-quick with aa", 4, 8, {"acl"}),
        ("linf8-quick", "linf8-quick with aa", 8, 8, {"acl", "acl (with aa)"}),
    ],
)
def test_the_worst_of_fewer_attacks_is_another_line(lab, tmp_path, drawn, first, second, at_first, at_second, names):
    for suite, k, right in ((first, at_first, 10), (second, at_second, 9)):
        parts = [lab.cell("acl", "pgd", ones(10), suite=suite, quick=True, eps=k / 255)]
        parts += [lab.cell("acl", "aa", ones(right), suite=suite, quick=True, eps=k / 255)] if "aa" in suite else []
        lab.cell("acl", "worst", ones(right), suite=suite, quick=True, eps=k / 255, of=parts)
    accuracy_against_eps(lab.results(), tmp_path / "a.png")
    worst = lines_of(drawn[0].axes[-1])
    assert worst.keys() == names and sum(map(len, worst.values())) == 2


def changed(row, **identity):
    """The row of records of another identity."""
    return replace(row, parts=tuple(replace(cell, identity={**cell.identity, **identity}) for cell in row.parts))


def test_other_images_of_one_name_are_lines_of_their_own_from_their_own_clean_accuracy(lab, tmp_path, drawn):
    found = []
    for name, clean, attacked in (("a", 0, {4: 0, 8: 0}), ("b", 19, {8: 3})):
        other = type(lab)(tmp_path / name)
        for k, right in attacked.items():
            other.cell("acl", "clean", ones(clean), suite=f"linf{k}")
            other.cell("acl", "pgd", ones(right), suite=f"linf{k}", eps=k / 255)
        found += [changed(row, images=name * 64) for row in rows(other.results())]
    figures.against_eps(found, tmp_path / "a.png")
    (panel,) = drawn[0].axes
    assert lines_of(panel) == {
        "acl (images aaaaaa)": [[0, 0], [4, 0], [8, 0]],
        "acl (images bbbbbb)": [[0, 95], [8, 15]],
    }


@pytest.mark.parametrize(
    "other, word",
    [
        ({"chunk": 20}, "chunks of 20"),
        ({"defense": {"votes": 0, "noise": 0.5}}, "defence "),
        ({"attack": {"name": "pgd", "start": "x"}}, "record "),
    ],
)
def test_a_line_has_one_number_at_an_eps(lab, tmp_path, drawn, other, word):
    second = type(lab)(tmp_path / "second")
    lab.cell("acl", "pgd", ones(10))
    second.cell("acl", "pgd", ones(3), settings={"start": "x"})
    found = [*rows(lab.results()), *(changed(row, **other) for row in rows(second.results()))]
    figures.against_eps(found, tmp_path / "a.png")
    lines = lines_of(drawn[0].axes[0])
    assert len(lines) == 2 and any(name.startswith(f"acl ({word}") for name in lines)
    assert sorted(points for (points,) in lines.values()) == [[8, 15], [8, 50]]


def bounded(lab):
    """A row whose PGD and worst case are upper bounds, beside one of measures."""
    for defense, right in (("masked", 18), ("plain", 4)):
        lab.cell(defense, "clean", ones(20))
        lab.cell(defense, "pgd", ones(right))
        lab.cell(defense, "worst", ones(4))
    return [replace(row, bounds=("pgd", "worst") if row.labels["defense"] == "masked" else ()) for row in rows(lab.results())]


def said_by(artists):
    """What the markers of lines say, apart by whether they are hollow."""
    said = {True: [], False: []}
    for line in artists:
        said[same_color(line.get_markerfacecolor(), "white")] += (line.get_gid() or "").split(TIPS)[1:]
    return said


@pytest.mark.parametrize("draw", [figures.against_eps, accuracy_by_defence])
def test_upper_bounds_are_hollow_and_say_so(lab, tmp_path, drawn, draw):
    path = draw(bounded(lab), tmp_path / "a.svg")
    said = said_by(line for panel in drawn[0].axes for line in panel.lines)
    assert len(said[True]) == 2 and all(text.startswith("masked") and text.endswith(UPPER) for text in said[True])
    assert {text.split(":")[1].split(" [")[0] for text in said[True]} == {" 90 %", " 20 %"}
    assert len(said[False]) >= 4 and not any(BOUND in text for text in said[False])
    for line in drawn[0].axes[0].lines:  # a solid marker stands nowhere below a hollow one
        if line.get_markevery() is not None:
            assert len(line.get_markevery()) < len(line.get_xdata())
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts.count(UPPER) == 1 and UPPER in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("draw", [figures.against_eps, accuracy_by_defence])
def test_without_upper_bounds_there_is_no_word_of_them(lab, tmp_path, drawn, draw):
    path = draw([replace(row, bounds=()) for row in bounded(lab)], tmp_path / "a.svg")
    assert BOUND not in path.read_text(encoding="utf-8")
    assert not said_by(line for panel in drawn[0].axes for line in panel.lines)[True]


def test_norms_and_data_sets_have_rows_of_their_own(lab, tmp_path, drawn):
    lab.cell("acl", "pgd", ones(10))
    lab.cell("acl", "pgd", ones(10), norm="l2", eps=0.5, suite="l2-0.5")
    lab.cell("acl", "pgd", ones(10), dataset="digits")
    accuracy_against_eps(lab.results(), tmp_path / "a.png")
    assert [panel.get_ylabel().split("\n")[0] for panel in drawn[0].axes] == [
        "cifar10, l2, n=20",
        "cifar10, l-inf, n=20",
        "digits, l-inf, n=20",
    ]


def test_nothing_to_draw_is_an_error(lab, tmp_path):
    lab.cell("acl", "clean", ones(10))
    lab.cell("acl", "pgd", ones(10), chunks_done=1)
    with pytest.raises(BadInput, match="no finished attack"):
        accuracy_against_eps(lab.results(), tmp_path / "a.png")
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_image_pairs(tmp_path, drawn, channels):
    rng = np.random.default_rng(0)
    clean = rng.random((2, channels, 8, 8), dtype=np.float32)
    attacked = np.clip(clean + 0.1 * np.sign(rng.normal(size=clean.shape)), 0, 1)
    path = image_pairs(clean, attacked, [("cat", "dog")] * 2, tmp_path / "images.png", eps=0.1)
    assert png_size(path) == (round((1.25 * 2 + 0.9) * DPI), round(4.4 * DPI))
    panels = drawn[0].axes
    assert len(panels) == 6 and [panel.get_title() for panel in panels[::2]] == ["cat", "dog", ""]
    seen = panels[4].images[0].get_array().reshape(8, 8, channels)
    assert np.allclose(seen, (0.5 + (attacked - clean)[0] / 0.2).transpose(1, 2, 0), atol=1e-6)
    assert "× 5" in panels[4].get_ylabel()
    first = path.read_bytes()
    assert image_pairs(clean, attacked, [("cat", "dog")] * 2, path, eps=0.1).read_bytes() == first


@pytest.mark.parametrize(
    "clean, attacked, titles, eps",
    [
        ((2, 3, 8, 8), (2, 3, 8, 7), 2, 0.1),
        ((2, 2, 8, 8), (2, 2, 8, 8), 2, 0.1),
        ((2, 3, 8, 8), (2, 3, 8, 8), 1, 0.1),
        ((0, 3, 8, 8), (0, 3, 8, 8), 0, 0.1),
        ((2, 3, 8, 8), (2, 3, 8, 8), 2, 0.0),
    ],
)
def test_image_pairs_refuses(tmp_path, clean, attacked, titles, eps):
    with pytest.raises(BadInput, match="image_pairs"):
        image_pairs(np.zeros(clean), np.zeros(attacked), [("a", "b")] * titles, tmp_path / "x.png", eps)
