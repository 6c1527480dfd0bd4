"""Figures of settle: what is drawn are the records' numbers, in order; the same bytes each time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

import rush_bench as rb
from rush_bench.records.statistics import Estimate, interval, paired_difference
from rush_bench.report import figures, settle
from rush_bench.report import settle_figures as drawing

RNG = np.random.default_rng(0)
RIGHT = {name: RNG.integers(0, 5, 20) for name in "abcdefg"}  # of 4 predictions
FOUR = np.full(20, 4)
WATERFALL = (
    ("T15", "AA as published", "aa-published", RIGHT["a"], {}),
    ("T15", "never the clean image back", "aa-published", RIGHT["b"], {}),
    ("T15", "PGD as published", "pgd-published", RIGHT["c"], {}),
    ("T15", "fresh noise at every step", "pgd-published", RIGHT["d"], {}),
    ("T15", "APGD on a bank of 64", "aa", RIGHT["f"], {"bank": [1] * 5 + [0] * 15}),
    ("T15", "worst case over all", "worst", RIGHT["e"], {}),
)
CLEAN = ("T10", "0", "clean", RIGHT["g"], {})


def percent(name):
    return 100 * interval(RIGHT[name], FOUR, False).value


def eot(experiment, name, key, **more):
    return (experiment, name, "eot", RIGHT[key], more)


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were when saved."""
    kept = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), save(figure, path))[1])
    return kept


def lines_of(panel):
    """Points of each labelled line with error bars."""
    return {bars.get_label(): bars.lines[0].get_xydata() for bars in panel.containers if hasattr(bars, "has_yerr")}


def shown(panel):
    """Whether every point with error bars lies within the panel."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    points = np.concatenate([bars.lines[0].get_xydata() for bars in panel.containers])
    return bool(np.all((points >= (left, bottom)) & (points <= (right, top))))


def labels_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_waterfall_has_a_bar_a_correction_in_order(evidence, tmp_path, drawn):
    made = evidence(*WATERFALL, CLEAN)
    path = drawing.waterfall(made, tmp_path / "waterfall.png")
    (axes,) = drawn[0].axes
    bars = sorted(axes.patches, key=lambda bar: bar.get_x())
    assert [bar.get_y() + bar.get_height() for bar in bars] == pytest.approx([percent(name) for name in "abcdfe"])
    # a correction begins where the bar before it ends; the replays and the worst case stand on the ground
    assert [bar.get_y() for bar in bars] == pytest.approx([0, percent("a"), 0, percent("c"), percent("d"), 0])
    assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [
        drawing.GREY,
        drawing.BLUE,
        drawing.GREY,
        drawing.GREEN,  # gives back
        drawing.BLUE,
        drawing.RED,
    ]
    said = [text.get_text() for text in axes.texts]
    assert [text for text in said if text != "chance"] == [f"{percent(name):.1f}" for name in "abcdfe"]
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    assert ticks[0].replace("\n", " ") == "AA as published"
    step = settle.percent(paired_difference(RIGHT["b"], FOUR, RIGHT["a"], FOUR), signed=True)
    assert ticks[1].replace("\n", " ") == f"never the clean image back {step}"
    text = labels_of(drawn[0])
    assert f"clean {percent('g'):.1f}" in text and "same x', on its bank" in text
    first = path.read_bytes()
    assert drawing.waterfall(made, path).read_bytes() == first


def test_waterfall_shows_intervals(evidence, tmp_path, drawn):
    drawing.waterfall(evidence(*WATERFALL), tmp_path / "waterfall.png")
    (axes,) = drawn[0].axes
    found = [segment[:, 1] for lines in axes.collections for segment in lines.get_segments()]
    assert np.allclose(found, [100 * np.array(interval(RIGHT[name], FOUR, False)[1:]) for name in "abcdfe"])


def test_published_numbers_are_dashed_lines_with_their_source(evidence, tmp_path, drawn):
    for recipe in ("rush", "noise_sup"):
        drawing.waterfall(evidence(*WATERFALL, subject=f"{recipe}@64", recipe=recipe), tmp_path / f"{recipe}.png")
    levels = [
        {
            line.get_ydata()[0]
            for line in figure.axes[0].lines
            if len(set(line.get_ydata())) == 1 and line.get_linestyle() == "--"
        }
        for figure in drawn
    ]
    assert {77.8, 79.5} <= levels[0] and not {77.8, 79.5} & levels[1]
    assert "published AA 79.5 (RUSH paper, Table 1)" in labels_of(drawn[0])
    assert not any("published AA" in text for text in labels_of(drawn[1]))


def test_an_unfinished_bar_keeps_its_place_and_says_so(evidence, tmp_path, drawn):
    trials = list(WATERFALL)
    trials[3] = (*trials[3][:4], {"chunks_done": 1})
    drawing.waterfall(evidence(*trials), tmp_path / "waterfall.png")
    (axes,) = drawn[0].axes
    assert sorted(round(bar.get_x() + bar.get_width() / 2) for bar in axes.patches) == [0, 1, 2, 4, 5]
    (word,) = [text for text in axes.texts if "finished" in text.get_text()]
    assert word.get_position()[0] == 3


def test_sweep_draws_the_points_of_each_defence(evidence, tmp_path, drawn):
    rush = evidence(
        eot("T1", "m=4", "b", settings={"draws": 4}),
        eot("T1", "m=1", "a", settings={"draws": 1}),
        eot("T1", "m=16", "c", settings={"draws": 16}, chunks_done=1),
        eot("T3", "T=10", "c", settings={"steps": 10}),
        eot("T3", "T=20, 3 restarts", "d", settings={"steps": 20, "restarts": 3}),
        eot("T3", "T=40", "e", settings={"steps": 40}),
    )
    other = evidence(eot("T1", "m=1", "f", settings={"draws": 1}), subject="cohen@64")
    beside = drawing.Line("elsewhere", ((1, Estimate(0.5, 0.4, 0.6)), (128, Estimate(0.4, 0.3, 0.5))))
    drawing.sweep([rush, other], tmp_path / "sweep.png", [beside])
    first, second = drawn[0].axes  # no votes, no panel for them
    assert first.get_title().startswith("T1") and second.get_title().startswith("T3")
    assert shown(first) and shown(second)
    lines = lines_of(first)
    assert np.allclose(lines["rush-cifar10@64"], [(1, percent("a")), (4, percent("b"))])
    assert np.allclose(lines["cohen@64"], [(1, percent("f"))])
    assert np.allclose(lines["elsewhere"], [(1, 50), (128, 40)])
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["1", "4", "128"]
    whole, hollow = (bars for bars in second.containers)
    assert np.allclose(whole.lines[0].get_xydata(), [(10, percent("c")), (40, percent("e"))])
    assert np.allclose(hollow.lines[0].get_xydata(), [(60, percent("d"))])
    assert hollow.lines[0].get_markerfacecolor() == "white"


def test_sweep_over_votes(evidence, tmp_path, drawn):
    made = evidence(eot("T13", "8 votes", "a", on="votes=8"), eot("T13", "1 votes", "b", on="votes=1"))
    drawing.sweep([made], tmp_path / "sweep.png")
    (panel,) = drawn[0].axes
    assert np.allclose(lines_of(panel)["rush-cifar10@64"], [(1, percent("b")), (8, percent("a"))])


def test_eps_starts_at_clean_and_has_the_level_of_a_guess(evidence, tmp_path, drawn):
    made = evidence(CLEAN, eot("T10", "8 eps", "b", scale=8.0), eot("T10", "0.5 eps", "a", scale=0.5))
    drawing.eps([made], tmp_path / "eps.png")
    (panel,) = drawn[0].axes
    assert np.allclose(
        lines_of(panel)["rush-cifar10@64"], [(0, percent("g")), (4 / 255, percent("a")), (64 / 255, percent("b"))]
    )
    assert shown(panel) and [tick.get_text() for tick in panel.get_xticklabels()] == ["0", "4", "8", "16", "32", "64"]
    assert any(np.allclose(line.get_ydata(), 25) for line in panel.lines)  # four classes


def test_attacks_stand_beside_the_worst_case(evidence, tmp_path, drawn):
    made = evidence(
        eot("T0", "random points", "a"),
        eot("T14", "this defence", "b"),
        eot("T14", "simclr", "c", on="model=simclr"),
        eot("T9", "projected", "f", chunks_done=1),
        eot("T9", "graph", "f"),
        ("T11", "worst case over all", "worst", RIGHT["d"], {}),
    )
    drawing.attacks(made, tmp_path / "attacks.png")
    (axes,) = drawn[0].axes
    names = dict(zip(axes.get_yticks(), (tick.get_text() for tick in axes.get_yticklabels()), strict=True))
    dots = {names[bars.lines[0].get_ydata()[0]]: bars.lines[0] for bars in axes.containers}
    assert {name: dot.get_xdata()[0] for name, dot in dots.items()} == pytest.approx(
        {"random points": percent("a"), "this defence": percent("b"), "simclr": percent("c"), "graph": percent("f")}
    )
    assert [name for name, dot in dots.items() if dot.get_markerfacecolor() == "white"] == ["simclr"]
    assert "projected (not finished)" in names.values()
    assert any(np.allclose(line.get_xdata(), percent("d")) and len(line.get_xdata()) == 2 for line in axes.lines)


def test_only_what_there_is_becomes_a_figure(evidence, tmp_path):
    some = evidence(eot("T1", "m=1", "a", settings={"draws": 1}), eot("T1", "m=4", "b", settings={"draws": 4}))
    other = evidence(*WATERFALL, subject="acl@64", eps=4 / 255)
    nothing = evidence(eot("T4", "CE", "a", chunks_done=0), subject="simclr")
    paths = drawing.write_figures([some, other, nothing], tmp_path)
    assert [path.name for path in paths] == ["acl@64-cifar10-linf4-quick-waterfall.png", "cifar10-linf8-quick-sweep.png"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in drawing.write_figures([some, other, nothing], tmp_path)] == first


def test_different_numbers_of_images_are_told_apart(evidence, tmp_path, drawn):
    def made(subject, n):
        trials = [("T1", f"m={m}", "eot", np.full(n, 2), {"settings": {"draws": m}}) for m in (1, 4)]
        return evidence(*trials, subject=subject)

    drawing.sweep([made("rush@64", 20), made("rush@1", 30)], tmp_path / "sweep.png")
    assert labels_of(drawn[0]) == ["rush@64, n=20", "rush@1, n=30"]


@pytest.mark.parametrize(
    ("differs", "marks"),
    [
        ([{}], [""]),
        ([{"n": 20}, {"n": 12}], ["-n20", "-n12"]),
        ([{"seed": 0}, {"seed": 3}], ["-seed0", "-seed3"]),
        ([{"n": 20}, {"n": 12}, {"n": 12, "seed": 3}], ["-n20-seed0", "-n12-seed0", "-n12-seed3"]),
    ],
)
def test_each_has_a_figure_also_where_only_n_or_the_seed_differs(evidence, lab, monkeypatch, differs, marks):
    made = []
    for how in differs:
        n, seed = how.get("n", 20), {"seed": how.get("seed", 0)}
        trials = [(experiment, name, attack, right[:n], more) for experiment, name, attack, right, more in WATERFALL]
        made.append(evidence(*trials, **seed))
    made.append(evidence(*WATERFALL, subject="other@64"))
    monkeypatch.setattr("rush_bench.api.figure._found", lambda folder: made)
    paths = rb.figure("waterfall", lab.folder, format="svg")
    names = [*(f"rush-cifar10@64-cifar10-linf8-quick{mark}" for mark in marks), "other@64-cifar10-linf8-quick"]
    assert [path.name for path in paths] == [f"{name}-waterfall.svg" for name in names] and all(map(Path.is_file, paths))


def test_other_images_alone_tell_files_apart(evidence):
    first, second = (evidence(CLEAN, budget="quick") for _ in range(2))
    entry = second.entries[0]
    other = replace(entry, result=replace(entry.result, identity={**entry.result.identity, "images": "b7d9c2e1"}))
    first_name, second_name = settle.stems([first, replace(second, entries=(other,))])
    assert second_name == "rush-cifar10@64-cifar10-linf8-quick-n20-seed0-b7d9c2" and first_name != second_name
