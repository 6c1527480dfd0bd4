"""Figures: PNGs of the size stated, the same bytes each time, every line and chance level in its place."""

import struct

import numpy as np
import pytest
from matplotlib.figure import Figure

from rush_bench.errors import BadInput
from rush_bench.report import figures
from rush_bench.report.figures import DPI, accuracy_against_eps, image_pairs


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
