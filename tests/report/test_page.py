"""The page of a results folder: every number of the tables at its full value, nothing from elsewhere, no name read as HTML."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

from rush_bench.attacks.suites import parse_suite
from rush_bench.audits.evidence import Evidence
from rush_bench.audits.run import judge
from rush_bench.audits.verdict import Claim
from rush_bench.certificates import Sampling
from rush_bench.certificates.tsv import frame_of
from rush_bench.datasets import Images, load_dataset
from rush_bench.defenses import Deterministic, Smoothed
from rush_bench.errors import BadInput
from rush_bench.evaluation import certify
from rush_bench.evaluation.runner import attack
from rush_bench.noise import Gaussian
from rush_bench.progress import amount
from rush_bench.report import cost_figure, settle, tables
from rush_bench.report.audits import sentence, write
from rush_bench.report.cards import training_of
from rush_bench.report.certificates import shared_radii, summary
from rush_bench.report.figures import UPPER
from rush_bench.report.from_records import evidence_of
from rush_bench.report.page import PARTS, write_page
from rush_bench.report.page.gallery import SHOWN
from rush_bench.report.rows import rows
from rush_bench.store import read_card, save_model

NAMES = ("clean", "pgd", "eot", "worst")
CARD = {"recipe": "rush", "dataset": "cifar10", "network": {"name": "tiny", "classes": 4, "channels": 3, "size": 32}}
HISTORY = [{"stage": "pretrain", "epoch": k, "loss": 5.0 / k, "knn": 0.5 + 0.1 * k} for k in (1, 2, 3)]


class Reader(HTMLParser):
    """What a browser would find: cells of tables by the id of their table, sections, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: dict[str, list[dict[str, str]]] = {}
        self.sections, self.tags, self.attributes = list[str](), list[str](), list[tuple[str, str, str]]()
        self.ids, self.table, self.words = list[str](), "", list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in known.items()]
        self.ids += [known["id"]] if "id" in known else []
        if tag == "table":
            self.table = known["id"].removeprefix("table-")
        elif tag == "section":
            self.sections.append(known.get("id", ""))
        elif tag in ("td", "th"):
            self.cells.setdefault(self.table, []).append(known)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is drawn: where the test is about something else they would take most of its time."""
    monkeypatch.setattr("rush_bench.report.page.inline", lambda draw, prefix: Markup())


def ones(k: int, n: int = 20) -> np.ndarray:
    return (np.arange(n) < k).astype(int)


def fill(lab) -> None:
    """Two defences at two radii, one of them Table 1's."""
    rng = np.random.default_rng(0)
    for eps, suite in ((8 / 255, "linf8-quick"), (0.1, "linf25.5-quick")):
        for name in NAMES:
            right = rng.integers(0, 5, 20)
            lab.cell("rush@64", name, right, repeats=4, votes=64, eps=eps, suite=suite, sha256="s")
            if name != "eot":
                lab.cell("net<script>alert(1)</script>", name, ones(len(name)), eps=eps, suite=suite)


@pytest.fixture(scope="module")
def whole(shared_lab) -> Path:
    """A page with its figures, made once: drawing takes most of the time."""
    fill(shared_lab)
    return write_page(shared_lab.folder, store=store(shared_lab.folder / "models"), title="<i>mine</i> & ours")


@pytest.mark.parametrize("style", tables.STYLES)
def test_every_number_of_the_table_is_there_in_full_with_its_interval(undrawn, lab, style: str) -> None:
    fill(lab)
    found = read(write_page(lab.folder)).cells["measured" if style == "plain" else "published"]
    shown = {tuple(float(cell[key]) for key in ("data-v", "data-low", "data-high")) for cell in found if "data-low" in cell}
    frame = tables.table(lab.results(), style)
    numbers = [name for name in frame if f"{name}_low" in frame]
    wanted = {
        tuple(line[part] for part in (name, f"{name}_low", f"{name}_high"))
        for line in frame.to_dict("records")
        for name in numbers
        if not np.isnan(line[name])
    }
    assert len(wanted) > 5 and shown == wanted
    if style == "paper":
        published = {float(cell["data-v"]) for cell in found if "data-v" in cell and "data-low" not in cell}
        assert set(frame["published_pgd"].dropna()) <= published


def test_every_number_leads_to_the_record_it_was_computed_from(whole: Path, shared_lab) -> None:
    text, page = whole.read_text(encoding="utf-8"), read(whole)
    assert len(page.ids) == len(set(page.ids))
    targets = [value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert len(targets) > 20 and set(targets) <= set(page.ids)
    for result in shared_lab.results():
        assert json.dumps(result.identity["weights"]) in page.text and f"runs/{result.folder.name}" in page.text
    (row,) = re.findall(r'<a href="#(r\d+)"[^>]*title="Worst: [^"]* K=4, n=20, seed=0"', text)[:1]
    record = re.search(rf'<div id="{row}">.*?<pre[^>]*>(.*?)</pre>', text, re.S)
    assert record and "worst" in record[1]


def test_names_are_never_read_as_html(whole: Path) -> None:
    page = read(whole)
    assert "alert(1)" in page.text and "<i>mine</i> & ours" in page.text
    assert [text for text in page.words if "alert(1)" in text and "<script>" not in text] == []
    assert page.tags.count("script") == 1 and "i" not in page.tags


def test_nothing_is_asked_of_elsewhere(whole: Path) -> None:
    text, page = whole.read_text(encoding="utf-8"), read(whole)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster", "clip-path", "xmlns"):
            assert value.startswith(("#", "data:", "url(#")), (tag, name, value)
    assert not {"iframe", "object", "embed", "base", "form", "audio", "video"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(|://", text)
    assert "default-src 'none'" in text


def test_a_part_is_absent_where_there_is_nothing(undrawn, lab, tmp_path: Path) -> None:
    lab.cell("mine", "clean", ones(12), dataset="grey")
    page = read(write_page(lab.folder))
    assert [part for part in PARTS if part in page.sections] == ["measured"]
    fill(lab)
    page = read(write_page(lab.folder, store=store(tmp_path / "models")))
    assert [part for part in PARTS if part in page.sections] == ["measured", "published", "figures", "galleries", "models"]
    assert "rows have no attacked images on disk" in page.text


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_records_is_refused_with_the_fix(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "runs" / "photos").mkdir(parents=True)
        (tmp_path / "runs" / "photos" / "cell.json").write_text("{}")
    with pytest.raises(BadInput, match="rush-bench attack"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_what_is_unfinished_or_left_out_is_said(undrawn, lab) -> None:
    fill(lab)
    lab.cell("late", "pgd", ones(9), chunks_done=1)
    broken = lab.cell("broken", "pgd", ones(9))
    (lab.store.folder(broken) / "cell.json").write_text("{")
    page = read(write_page(lab.folder))
    assert "1 not finished" in page.text and "pgd: 1 of 2 chunks" in page.text
    assert "Left out" in page.text and f"left out runs/{broken.key[:16]}" in page.text


def test_the_same_records_make_the_same_page(whole: Path, tmp_path: Path) -> None:
    again = write_page(whole.parent, tmp_path / "again.html", store=whole.parent / "models", title="<i>mine</i> & ours")
    assert again.read_bytes() == whole.read_bytes()


def store(folder: Path, sha256: str = "s") -> Path:
    """A store with the card of `rush`, which trained for 12.5 seconds."""
    card = CARD | {"name": "rush", "votes": [64], "seconds": 12.5, "validation": {"knn": 0.8, "history": HISTORY}}
    card |= {"pretrain_dataset": "cifar10", "seed": 0, "settings": {"noise": "uniform:0.3"}}
    card |= {"data": {"n_train": 2048, "n_pretrain": 2048}}
    save_model(folder / "rush", card, {"weight": torch.zeros(1)})
    card = json.loads((folder / "rush" / "card.json").read_text()) | {"sha256": {"model": sha256}}
    del card["digest"]
    (folder / "rush" / "card.json").write_text(json.dumps(card))
    return folder


def test_a_model_has_its_card_its_learning_curve_and_its_cost(whole: Path, shared_lab) -> None:
    text = whole.read_text(encoding="utf-8")
    for epoch in HISTORY:
        assert f"<title>loss, pretrain, epoch {epoch['epoch']}: {epoch['loss']:.5g}</title>" in text
        assert f"<title>knn, epoch {epoch['epoch']}: {100 * epoch['knn']:.5g}</title>" in text
    (frame,) = [
        line
        for line in tables.table(shared_lab.results()).to_dict("records")
        if line["suite"] == "linf8-quick" and line["K"] == 4
    ]
    spent = amount(training_of(read_card(whole.parent / "models", "rush")).passes)
    interval = f"[{frame['worst_low']:.6g}, {frame['worst_high']:.6g}]"
    assert f"rush@64: {frame['worst']:.6g} % {interval}; {spent} passes of training, 12.5 s on" in text


def test_a_line_joins_one_system_at_several_costs(lab, monkeypatch, tmp_path: Path) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(cost_figure, "save", lambda figure, path: kept.append(figure) or path)
    monkeypatch.setattr(cost_figure, "training_of", lambda card: SimpleNamespace(passes=card["passes"]))
    cards = {}
    for name, recipe, votes, spent, right in (
        ("rush", "rush", 1, 4000.0, 9),
        ("rush-seed1", "rush", 1, 4000.0, 11),
        ("rush-quarter", "rush", 1, 1000.0, 6),
        ("rush-many", "rush", 64, 2000.0, 9),  # another defence
        ("acl", "acl", 0, 4000.0, 8),
        ("acl-slf", "acl", 0, 3000.0, 7),  # another head
    ):
        cards[name] = {"passes": spent, "recipe": recipe, "network": {"name": "resnet18"}, "seed": int(name == "rush-seed1")}
        cards[name]["protocol"] = "SLF" if name == "acl-slf" else "AFF"
        lab.cell(name, "worst", ones(right), votes=votes, repeats=1, model=name, weights=name, sha256=name)
    cost_figure.accuracy_against_cost(rows(lab.results()), cards, tmp_path / "cost.svg")
    (panel,) = kept[0].axes
    joined = [line.get_xydata() for line in panel.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
    assert len(joined) == 1 and np.allclose(joined[0], [(1000, 30), (4000, 50)])
    assert {text.get_text() for text in panel.texts} == {*cards} - {"rush-seed1"}  # its first seed is named


@pytest.mark.parametrize("count", [3, cost_figure.CROWD + 1])
def test_cost_names_all_or_those_that_nothing_as_cheap_surpasses(lab, monkeypatch, tmp_path: Path, count: int) -> None:
    monkeypatch.setattr(cost_figure, "training_of", lambda card: SimpleNamespace(passes=card["passes"]))
    cards = {f"m{k}": {"passes": 1000.0 * (k + 1)} for k in range(count)}
    for k in range(count):
        lab.cell(f"m{k}", "worst", ones(10 if k % 2 else 5 + k // 8), model=f"m{k}", weights=f"w{k}", sha256=f"s{k}")
    path = cost_figure.accuracy_against_cost(rows(lab.results()), cards, tmp_path / "cost.svg")
    assert path is not None
    words = {html.unescape(word) for word in re.findall(r">([^<>]+)</text>", path.read_text(encoding="utf-8"))}
    assert words & {*cards} == ({*cards} if count == 3 else {"m0", *(f"m{k}" for k in range(1, count, 2))})
    assert any("surpasses" in word for word in words) == (count > cost_figure.CROWD)


def test_cost_marks_upper_bounds_which_surpass_nothing(lab, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cost_figure, "training_of", lambda card: SimpleNamespace(passes=card["passes"]))
    names = ["masked", *(f"m{k}" for k in range(cost_figure.CROWD))]
    for name in names:
        lab.cell(name, "worst", ones(20 if name == "masked" else 10), model=name, weights=name, sha256=name)
    cards = {name: {"passes": 1000.0 * (k + 1)} for k, name in enumerate(names)}
    found = [replace(row, bounds=("worst",) * (row.labels["defense"] == "masked")) for row in rows(lab.results())]
    for kept in (found, [replace(row, bounds=()) for row in found]):
        path = cost_figure.accuracy_against_cost(kept, cards, tmp_path / "cost.svg")
        assert path is not None
        text = path.read_text(encoding="utf-8")
        words = set(re.findall(r">([^<>]+)</text>", text))
        bound = kept is found
        assert ("masked †" in words) == (UPPER in words) == ("masked: 100 % [83.1567, 100] † upper bound" in text) == bound
        assert ("m0" in words) == bound


def test_a_cost_line_is_of_one_setting(lab, monkeypatch, tmp_path: Path) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(cost_figure, "save", lambda figure, path: kept.append(figure) or path)
    monkeypatch.setattr(cost_figure, "training_of", lambda card: SimpleNamespace(passes=card["passes"]))
    cards = {}
    for name, spent, cases in (("a", 4000.0, ((4, 20), (18, 1))), ("b", 1000.0, ((2, 20),))):
        cards[name] = {"passes": spent, "recipe": "r"}
        for right, steps in cases:
            pgd = lab.cell(name, "pgd", ones(right), model=name, weights=name, sha256=name, settings={"steps": steps})
            lab.cell(name, "worst", ones(right), model=name, weights=name, sha256=name, of=[pgd])
    cost_figure.accuracy_against_cost(rows(lab.results()), cards, tmp_path / "cost.svg")
    (panel,) = kept[0].axes
    joined = [line.get_xydata() for line in panel.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
    assert len(joined) == 1 and np.allclose(joined[0], [(1000, 10), (4000, 20)])
    assert {text.get_text() for text in panel.texts} == {"a", "a (pgd with steps=1 (usual 20))", "b"}


def test_what_is_the_same_in_every_row_stands_above_the_table(undrawn, lab) -> None:
    for name, right in (("a", 5), ("b", 6)):
        lab.cell(name, "clean", ones(right), sha256=name, weights=name)
        lab.cell(name, "worst", ones(right - 1), sha256=name, weights=name)
    page = write_page(lab.folder).read_text(encoding="utf-8")
    (caption,) = re.findall(r"<caption>(Everything[^<]*)</caption>", page)
    assert "linf8" in caption and "n=20" in caption
    hidden = re.findall(r'class="\w+ off" data-head>([^<]*)<', page.partition('id="published"')[0])
    assert {"Data set", "Threat", "Suite", "n"} <= {*hidden} and "Worst" not in hidden


def test_a_record_says_what_it_was_made_on(undrawn, digits, lab) -> None:
    images, network = digits
    fill(lab)  # records that do not say
    suite = parse_suite("linf25.5-quick", only=("clean", "pgd"), overrides={"pgd.steps": 1})
    run = attack(
        Deterministic(network, name="plain", shape=images.shape, device="cpu"), suite, images, out=lab.folder, quiet=True
    )
    text = read(write_page(lab.folder)).text
    (said,) = {made for result in run.results if result.labels["attack"] == "pgd" for made in result.made_on}
    assert said == f"cpu, torch {torch.__version__}, search in float32" and said in text
    assert "not noted: an older record" in text


def test_a_card_of_other_weights_is_not_shown(undrawn, lab, tmp_path: Path) -> None:
    fill(lab)
    page = read(write_page(lab.folder, store=store(tmp_path / "models", sha256="other")))
    assert "other weights under this name" in page.text and "12.5" not in page.text


@pytest.fixture
def digits() -> tuple[Images, nn.Linear]:
    """Twelve digits, and a network of fixed weights."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(10, 256, generator=torch.Generator().manual_seed(0)))
    return load_dataset("digits", "test", 12), network.eval()


@pytest.mark.parametrize("known", [True, False])
def test_a_gallery_has_clean_images_only_where_they_are_those_that_were_attacked(
    undrawn, digits, tmp_path: Path, known: bool
) -> None:
    images, network = digits
    if not known:
        images = replace(images, pixels=255 - images.pixels)
    suite = parse_suite("linf25.5-quick", ("clean", "pgd"), {"pgd.steps": 1, "pgd.select_draws": 1})
    run = attack(Deterministic(network, name="net", shape=images.shape), suite, images, out=tmp_path, quiet=True)
    page = read(write_page(tmp_path))
    (gallery,) = [result for result in run.results if result.labels["attack"] == "worst"]
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == SHOWN * (3 if known else 1)
    assert ("not on this machine" in page.text) != known
    stored = np.load(gallery.folder / "adversarial-0000.npy")
    drawn = [png(value) for value in pictures[1::3]] if known else [png(value) for value in pictures]
    assert all(any(np.abs(one - image[0]).max() < 1 / 254 for image in stored) for one in drawn)


class Rounded(nn.Module):
    """A layer without a gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(16 * x) / 16


@pytest.mark.strangers
def test_a_dagger_says_why(undrawn, digits, tmp_path: Path) -> None:
    images, network = digits
    suite = parse_suite("linf25.5-quick", ("clean", "pgd"), {"pgd.steps": 1, "pgd.select_draws": 1})
    masked = Deterministic(nn.Sequential(Rounded(), network).eval(), name="masked", shape=images.shape)
    attack(masked, suite, images, out=tmp_path, quiet=True)
    marks = [value for tag, name, value in read(write_page(tmp_path)).attributes if (tag, name) == ("sup", "title")]
    assert len(marks) == 2 and all("†: an upper bound" in mark and "no gradient on 100%" in mark for mark in marks)


def png(address: str) -> np.ndarray:
    """A grey PNG in a `data:` address, (H, W) in [0, 1]."""
    return imread(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))


def test_certificates_say_the_accuracy_at_each_radius(undrawn, digits, tmp_path: Path) -> None:
    images, network = digits
    smoothed = Smoothed(network, noise=Gaussian(0.25), votes=4, name="soft@4", shape=images.shape)
    run = certify([smoothed], images, Sampling("fixed", 10, 200), out=tmp_path, quiet=True)
    page = read(write_page(tmp_path))
    assert [part for part in PARTS if part in page.sections] == ["certificates"]
    found = summary(frame_of(run.results[0]), shared_radii(run.results))
    shown = [float(cell["data-v"]) for cell in page.cells["certified-l2"] if "data-low" in cell]
    assert shown == [100 * at["accuracy"] for at in found["certified"]]


def test_corruptions_have_mce_where_a_reference_is_named(lab) -> None:
    room = type(lab)(lab.folder / "corruptions")
    for name, right in (("mine", 12), ("base", 8)):
        for severity in range(1, 6):
            which = {"corruption": "fog", "severity": severity}
            room.cell(name, "corruption", ones(right + severity), suite="corruptions", settings=which, **which)
    cells = read(write_page(lab.folder)).cells["corrupted-0"]
    assert sorted(float(cell["data-v"]) for cell in cells if "data-v" in cell) == pytest.approx([55, 55, 75, 75])  # fog, mean
    cells = read(write_page(lab.folder, reference="base")).cells["corrupted-0"]
    assert sorted(float(cell["data-v"]) for cell in cells if "data-v" in cell)[-1] == pytest.approx(100)
    assert pytest.approx(100 * 25 / 45) in [float(cell["data-v"]) for cell in cells if "data-v" in cell]
    with pytest.raises(BadInput, match="'none' was not measured"):
        write_page(lab.folder, reference="none")


def claimed(lab, does) -> Evidence:
    """Finished trials of a defence, on disk as `settle` leaves them."""
    room = type(lab)(lab.folder / "settle")
    about = {
        "subject": "rush@64",
        "suite": "settle-quick",
        "threat_norm": "linf",
        "threat_eps": 8 / 255,
        "on": "",
        "scale": 1.0,
    }
    trials = [("T15", "AA as published", 15), ("T15", "never the clean image back", 11), ("T15", "PGD as published", 14)]
    for order, (experiment, trial, right) in enumerate([*trials, ("T11", "worst case", 6)]):
        more = {
            "experiment": experiment,
            "trial": trial,
            "order": order,
            "settings": {"trial": trial, **does(experiment, trial)},
            "repeats": 4,
            "votes": 64,
        }
        room.cell("rush@64", "worst" if experiment == "T11" else "pgd", 4 * ones(right), **more, **about)
    (evidence,) = evidence_of(room.results())
    return evidence


def test_a_claim_has_its_trials_checks_and_verdict(undrawn, lab, does) -> None:
    evidence = claimed(lab, does)
    audit = judge(evidence, [], Claim(0.7, "stated"))
    write(audit, lab.folder)
    page = read(write_page(lab.folder))
    assert [part for part in PARTS if part in page.sections] == ["claims"]
    shown = [float(cell["data-v"]) for cell in page.cells["trials-0"] if "data-low" in cell]
    assert shown == [100 * entry.estimate.value for entry in evidence.entries]
    assert audit.verdict and audit.verdict.word in page.text and sentence(audit) in page.text
    assert len(page.cells["findings-0"]) == 7 * (1 + len(audit.findings))
    assert "by the records and this version" not in page.text


def test_of_a_trial_under_several_settings_the_last_that_is_finished_counts(undrawn, lab, does) -> None:
    evidence = claimed(lab, does)
    old = evidence.of("T15")[0].result
    labels = {
        key: old.labels[key] for key in ("subject", "threat_norm", "threat_eps", "on", "scale", "experiment", "trial", "order")
    }
    room, more = type(lab)(lab.folder / "settle"), {**labels, "suite": "settle-quick", "repeats": 4, "votes": 64}
    new = room.cell("rush@64", "pgd", 4 * ones(3), settings={"steps": 99}, **more)
    room.cell("rush@64", "pgd", 4 * ones(2), settings={"steps": 100}, chunks_done=1, **more)
    os.utime(old.folder / "cell.json", (1, 1))
    (again,) = evidence_of(room.results())
    assert again.of("T15")[0].result.folder == room.store.folder(new) and len(again.entries) == 4
    assert "2 records are of trials that are there under several settings" in read(write_page(lab.folder)).text


def test_a_verdict_on_other_records_says_so(undrawn, lab, does) -> None:
    evidence = claimed(lab, does)
    audit = judge(evidence, [], Claim(0.7, "stated"))
    write(audit, lab.folder)
    path = lab.folder / "audit" / f"{settle.stem(evidence)}.json"
    kept = json.loads(path.read_text())
    kept["verdict"]["worst"]["high"] += 0.01
    path.write_text(json.dumps(kept))
    assert "by the records and this version" in read(write_page(lab.folder)).text


ASKED = """
const table = document.getElementById("table-measured"), buttons = [...table.querySelectorAll("thead button")], said = {};
const rows = () => [...table.tBodies[0].rows], k = buttons.findIndex((button) => button.textContent === "Worst");
const shown = () => rows().map((row) => Number(row.cells[k].dataset.v));
buttons[k].click();
said.down = shown();
buttons[k].click();
said.up = shown();
const filter = document.querySelector("[data-filter]");
filter.value = "RUSH 25.5";
filter.dispatchEvent(new Event("input"));
said.kept = rows().filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
document.querySelector(`[data-column="${k}"]`).click();
said.off = rows().every((row) => getComputedStyle(row.cells[k]).display === "none");
const link = rows().find((row) => !row.hidden).querySelector("td a");
link.focus();
said.tip = document.getElementById("tip").textContent;
const point = document.querySelector("figure svg .tip[tabindex]"), points = [...point.closest("svg").querySelectorAll(".tip")];
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
point.focus();
press("ArrowRight");
said.point = document.activeElement === points[1] && document.getElementById("tip").textContent === points[1].dataset.tip;
press("End");
const stops = points.filter((one) => one.getAttribute("tabindex") === "0");
said.last = document.activeElement === points.at(-1) && stops.length === 1;
link.click();
setTimeout(() => {
  const target = document.querySelector(":target");
  said.opened = target.checkVisibility() && target.id === link.hash.slice(1);
  document.body.append(Object.assign(document.createElement("pre"), { id: "said", textContent: JSON.stringify(said) }));
}, 200);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_in_a_browser(whole: Path, shared_lab, tmp_path: Path) -> None:
    asked = tmp_path / "asked.html"
    asked.write_text(whole.read_text(encoding="utf-8").replace("</body>", f"<script>{ASKED}</script></body>"), encoding="utf-8")
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    done = subprocess.run([*line, "--dump-dom", f"file://{asked}"], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr  # no error, and nothing was asked for: the page's policy would complain of it
    (answer,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)
    said = json.loads(html.unescape(answer))
    worst = sorted(tables.table(shared_lab.results())["worst"])
    assert said["up"] == worst and said["down"] == worst[::-1]
    assert said["kept"] == ["rush@64"] and said["off"] and said["opened"]
    assert said["point"] and said["last"]
    assert said["tip"].startswith("Clean: ") and "seed=0" in said["tip"]
