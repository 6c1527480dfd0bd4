"""Two folders that hold one cell: what rounding does is told, what it cannot do is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from rush_bench.errors import BadInput
from rush_bench.records import FORMAT, Cell, CellStore, load_results
from rush_bench.records.chunks import chunk_path
from rush_bench.records.curate import check_same
from rush_bench.records.same import sign_test

N, CHUNK, CLASSES = 200, 50, 4
DRAW = np.random.default_rng(0)
LABEL = DRAW.integers(CLASSES, size=N)
RIGHT = DRAW.random(N) < 0.7  # of the first folder's predictions, one an image
ORDER = DRAW.permutation(N)


def cell_of(attack: str, deterministic: bool = True, repeats: int = 1) -> Cell:
    threat = None if attack in ("clean", "certify") else {"norm": "linf", "eps": 0.1}
    identity = {"format": FORMAT, "weights": "w", "defense": {"votes": 0}, "attack": {"name": attack}, "images": "i"}
    identity |= {"threat": threat, "seed": 0, "repeats": repeats, "chunk": CHUNK}
    labels = {"defense": "net", "dataset": "d", "attack": attack, "suite": "linf8", "n": N}
    return Cell(identity, labels | {"deterministic": deterministic})


def write(
    results: Path, cell: Cell, right: np.ndarray, *, label: np.ndarray = LABEL, chunks: range | None = None, **more: np.ndarray
) -> None:
    """`right` (N,) of the cell's repeats of each image were right, all others of the next class."""
    store, repeats = CellStore(results), cell.identity["repeats"]
    store.open(cell)
    for c in chunks or range(cell.chunks):
        rows = np.array(cell.rows(c))
        mine, good = label[rows], right[rows].astype(np.int64)
        counts = np.zeros((len(rows), CLASSES), np.int64)
        counts[np.arange(len(rows)), mine] = good
        counts[np.arange(len(rows)), (mine + 1) % CLASSES] = repeats - good
        arrays = {"index": rows * 3, "label": mine, "correct": good, "repeats": np.full(len(rows), repeats), "counts": counts}
        arrays |= {name: np.zeros(len(rows)) for name in ("margin", "distance", "forwards", "backwards", "seconds")}
        arrays |= {name: value[rows] for name, value in more.items()}
        store.write(cell, c, arrays, np.zeros((len(rows), 1, 2, 2), np.float32) if cell.identity["threat"] else None)


def flipped(lost: int, won: int) -> np.ndarray:
    """RIGHT with so many of its images lost and so many won."""
    right, order = RIGHT.copy(), ORDER
    right[order[RIGHT[order]][:lost]] = False
    right[order[~RIGHT[order]][:won]] = True
    return right


def lines_of(folders: list[Path], how: str) -> list[str]:
    """What is said of the folders, by either door."""
    if how == "merge":
        return check_same(folders, folders[0].parent / "into")
    lines: list[str] = []
    load_results(*folders, warn=lines.append)
    return lines


@pytest.fixture(params=["load", "merge"])
def how(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("attack", "deterministic", "lost", "won", "said"),
    [
        ("clean", True, 0, 0, ""),
        ("clean", True, 1, 0, r"in 1 cell .*at most 0\.5 points"),
        ("clean", True, 5, 5, r"in 1 cell .*at most 0 points"),
        ("clean", True, 6, 5, "11 of 200 images are predicted otherwise"),
        ("clean", True, 40, 0, r"20\.0 points apart"),
        ("clean", False, 8, 6, r"at most 1 points"),
        ("pgd", True, 20, 20, r"at most 0 points"),
        ("pgd", True, 14, 0, r"at most 7 points"),
        ("pgd", True, 15, 0, r"7\.5 points apart"),
        ("pgd", True, 25, 3, r"11\.0 points apart"),
        ("certify", False, 30, 2, r"14\.0 points apart"),
    ],
)
def test_what_rounding_does_and_what_it_cannot(tmp_path, how, attack, deterministic, lost, won, said) -> None:
    cell, folders = cell_of(attack, deterministic), [tmp_path / "one", tmp_path / "two"]
    write(folders[0], cell, RIGHT)
    write(folders[1], cell, flipped(lost, won), seconds=np.ones(N), margin=np.full(N, 1e-7))
    for both in (folders, folders[::-1]):
        if "apart" in said or "otherwise" in said:
            with pytest.raises(BadInput, match=rf"net under {attack} .*{said}.*delete this record") as refused:
                lines_of(both, how)
            assert all(str(folder) in str(refused.value) for folder in folders)
            continue
        lines = lines_of(both, how)
        assert len(lines) == bool(said)
        assert all(re.search(said, line) and str(folder) in line for line in lines for folder in folders)


@pytest.mark.parametrize("what", ["label", "index", "repeats"])
def test_other_images_are_refused_at_equal_accuracy(tmp_path, how, what) -> None:
    cell = cell_of("clean", deterministic=False, repeats=2)
    write(tmp_path / "one", cell, RIGHT)
    if what == "label":
        write(tmp_path / "two", cell, RIGHT, label=np.where(np.arange(N) == 3, (LABEL + 1) % CLASSES, LABEL))
    else:
        write(tmp_path / "two", cell, RIGHT)
        path = chunk_path(CellStore(tmp_path / "two").folder(cell), 1)
        with np.load(path) as file:
            arrays = dict(file)
        if what == "index":
            arrays["index"][0] += 1
        else:
            arrays |= {name: 2 * arrays[name] for name in ("correct", "counts", "repeats")}
        np.savez(path, **arrays)
    with pytest.raises(BadInput, match="other images, labels or repeats"):
        lines_of([tmp_path / "one", tmp_path / "two"], how)


def test_draws_of_a_certificate_are_as_many_as_it_took(tmp_path, how) -> None:
    """90 of 100 were right; in the other folder 80 of 90 and 90 of 99 by turns, or 80 of 90 throughout."""
    cell, right = cell_of("certify", deterministic=False, repeats=100), np.full(N, 90)
    write(tmp_path / "one", cell, right)
    for every in (2, 1):
        write(tmp_path / "two", cell, right)
        path = chunk_path(CellStore(tmp_path / "two").folder(cell), 0)
        with np.load(path) as file:
            arrays = dict(file)
        fewer = np.where(np.arange(CHUNK) % every == 0, 10, 0)
        other = np.where(fewer, 0, 1)
        arrays["counts"] -= fewer[:, None] * np.eye(CLASSES, dtype=int)[LABEL[:CHUNK]]
        arrays["counts"] -= other[:, None] * np.eye(CLASSES, dtype=int)[(LABEL[:CHUNK] + 1) % CLASSES]
        arrays |= {"correct": arrays["correct"] - fewer, "repeats": arrays["repeats"] - fewer - other}
        np.savez(path, **arrays)
        apart = abs((80 / 90 - 0.9) * sum(fewer > 0) + (90 / 99 - 0.9) * sum(other)) / N
        assert apart < 0.005  # of no account, however sure
        (line,) = lines_of([tmp_path / "one", tmp_path / "two"], how)
        assert f"at most {100 * apart:.2g} points" in line


@pytest.mark.parametrize("room", ["", "corruptions", "settle/certificates"])
def test_sources_of_a_merge_are_compared_with_each_other_and_with_the_folder(tmp_path, room) -> None:
    cell = cell_of("clean")
    write(tmp_path / "one" / room, cell, RIGHT)
    write(tmp_path / "two" / room, cell, ~RIGHT)
    for sources, into in ((["one", "two"], "empty"), (["one"], "two")):
        with pytest.raises(BadInput, match="under one key"):
            check_same([tmp_path / each for each in sources], tmp_path / into)
    assert check_same([tmp_path / "one", tmp_path / "one"], tmp_path / "one") == []


def test_chunks_of_different_halves_are_not_compared_and_the_third_folder_is(tmp_path, how) -> None:
    cell = cell_of("clean")
    write(tmp_path / "one", cell, RIGHT, chunks=range(2))
    write(tmp_path / "two", cell, ~RIGHT, chunks=range(2, 4))
    folders = [tmp_path / "one", tmp_path / "two"]
    assert lines_of(folders, how) == []
    write(tmp_path / "three", cell, RIGHT)
    with pytest.raises(BadInput, match=r"two.*three"):
        lines_of([*folders, tmp_path / "three"], how)


def test_a_cell_of_other_labels_is_the_same_cell(tmp_path) -> None:
    """Another suite that shares it, say: the key alone counts."""
    cell = cell_of("clean")
    write(tmp_path / "one", cell, RIGHT)
    write(tmp_path / "two", Cell(cell.identity, cell.labels | {"suite": "l2-1"}), ~RIGHT)
    with pytest.raises(BadInput, match="under one key"):
        load_results(tmp_path / "one", tmp_path / "two")


def test_the_cell_with_more_chunks_is_taken_and_else_the_first(tmp_path) -> None:
    cell, folders = cell_of("clean"), [tmp_path / "one", tmp_path / "two"]
    write(folders[0], cell, RIGHT, chunks=range(3))
    write(folders[1], cell, flipped(1, 0))
    lines: list[str] = []
    for both in (folders, folders[::-1]):
        (taken,) = load_results(*both, warn=lines.append)
        assert taken.folder.is_relative_to(folders[1])
    assert all("from where it has more chunks, or else from the first" in line for line in lines)


def test_a_damaged_chunk_is_left_to_its_reader(tmp_path, how) -> None:
    cell, folders = cell_of("clean"), [tmp_path / "one", tmp_path / "two"]
    write(folders[0], cell, RIGHT)
    write(folders[1], cell, RIGHT)
    chunk_path(CellStore(folders[1]).folder(cell), 0).write_bytes(b"no archive")
    assert lines_of(folders, how) == []


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (1, 0), (5, 5), (15, 0), (14, 0), (60, 40), (3, 31), (2600, 2400)])
def test_the_sign_test_is_the_exact_binomial_one(more, fewer) -> None:
    expected = binomtest(more, more + fewer).pvalue if more + fewer else 1.0
    assert sign_test(more, fewer) == pytest.approx(expected, rel=1e-6)
