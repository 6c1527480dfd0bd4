"""Records on disk: keys, atomic chunks, damage, locks, kills, foreign folders."""

import dataclasses
import errno
import json
import multiprocessing
import signal
import time

import numpy as np
import pytest

from rush_bench.errors import BadInput, RushBenchError
from rush_bench.files import digest
from rush_bench.records import FORMAT, Cell, CellStore, load_results

N, CHUNK, CLASSES = 25, 10, 4


def make_cell(**labels):
    identity = {
        "format": FORMAT,
        "weights": "abc",
        "defense": {"noise": {"law": "uniform", "scale": 0.3}, "votes": 64},
        "attack": {"name": "pgd", "steps": 20},
        "threat": {"norm": "linf", "eps": 8 / 255},
        "images": "def",
        "seed": 0,
        "repeats": 5,
        "chunk": CHUNK,
    }
    named = {
        "defense": "rush@64",
        "dataset": "cifar10",
        "attack": "pgd",
        "suite": "linf8",
        "deterministic": False,
        "n": N,
    }
    return Cell(identity, named | labels)


def make_arrays(cell, chunk, seed=0, repeats=5):
    rng = np.random.default_rng(seed + chunk)
    rows = np.array(cell.rows(chunk))
    label = rng.integers(CLASSES, size=len(rows))
    counts = rng.multinomial(repeats, np.full(CLASSES, 1 / CLASSES), size=len(rows))
    return {
        "index": rows * 3,
        "label": label,
        "correct": counts[np.arange(len(rows)), label],
        "repeats": np.full(len(rows), repeats),
        "counts": counts,
        "margin": rng.normal(size=len(rows)).astype(np.float32),
        "distance": rng.random(len(rows)),
        "forwards": np.full(len(rows), 20.0),
        "backwards": np.full(len(rows), 20.0),
        "seconds": rng.random(len(rows)),
    }


def fill(store, cell, adversarial=False):
    store.open(cell)
    for chunk in range(cell.chunks):
        images = np.random.default_rng(chunk).random((len(cell.rows(chunk)), 1, 4, 4), dtype=np.float32)
        store.write(cell, chunk, make_arrays(cell, chunk), images if adversarial else None)


def test_chunks_cover_the_images_once():
    cell = make_cell()
    assert cell.chunks == 3
    assert [row for chunk in range(3) for row in cell.rows(chunk)] == list(range(N))


@pytest.mark.parametrize("key", [k for k in make_cell().identity if k != "format"])
def test_key_covers_every_setting_and_no_name(key):
    cell = make_cell()
    other = {"name": "x", "norm": "l2", "eps": 0.5} if isinstance(cell.identity[key], dict) else 12345
    assert dataclasses.replace(cell, identity=cell.identity | {key: other}).key != cell.key
    assert make_cell(defense="another name", suite="linf8-quick").key == cell.key
    shuffled = dict(reversed(cell.identity.items()))
    assert dataclasses.replace(cell, identity=shuffled).key == cell.key


@pytest.mark.parametrize("part, name", [("identity", "weights"), ("labels", "n")])
def test_a_cell_states_all_that_it_must(part, name):
    cell = make_cell()
    short = {k: v for k, v in getattr(cell, part).items() if k != name}
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(cell, **{part: short})


def test_what_is_written_is_read(tmp_path):
    store, cell = CellStore(tmp_path), make_cell()
    arrays = make_arrays(cell, 1) | {"bank_correct": np.ones(10, int), "bank_repeats": np.ones(10, int)}
    images = np.random.default_rng(0).random((10, 3, 4, 4), dtype=np.float32)
    store.open(cell)
    assert not store.has(cell, 1)
    store.write(cell, 1, arrays, images)
    assert [store.has(cell, chunk) for chunk in range(3)] == [False, True, False]
    found = store.read(cell, 1)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert np.array_equal(store.read_adversarial(cell, 1), images)
    assert sorted(path.name for path in store.folder(cell).iterdir()) == [
        "adversarial-0001.npy",
        "cell.json",
        "chunk-0001.npz",
    ]
    assert store.folder(cell) == tmp_path / "runs" / cell.key[:16]


def test_frame_has_a_row_an_image(tmp_path):
    store, cell = CellStore(tmp_path), make_cell()
    fill(store, cell)
    (result,) = load_results(tmp_path)
    frame = result.frame
    assert result.complete and result.labels == cell.labels and result.identity == cell.identity
    assert frame["index"].tolist() == [3 * i for i in range(N)]
    assert frame["correct"].sum() == sum(make_arrays(cell, c)["correct"].sum() for c in range(3))
    assert frame[[f"count_{k}" for k in range(CLASSES)]].sum(axis=1).tolist() == [5] * N
    assert "bank_correct" not in frame


def test_half_done_cells_say_so(tmp_path):
    store, cell = CellStore(tmp_path), make_cell()
    store.open(cell)
    assert load_results(tmp_path)[0].frame.empty
    store.write(cell, 2, make_arrays(cell, 2))
    result = store.result(cell)
    assert (result.chunks_done, result.chunks, result.complete) == (1, 3, False)
    assert len(result.frame) == 5
    assert load_results(tmp_path)[0].chunks_done == 1


def test_a_cell_under_two_names_is_measured_once_and_listed_twice(tmp_path):
    store, first, second = CellStore(tmp_path), make_cell(shape=(3, 4)), make_cell(suite="linf8-quick", shape=(3, 4))
    fill(store, first)
    for cell in (second, first, second):
        store.open(cell)
    results = load_results(tmp_path)
    assert [result.labels["suite"] for result in results] == ["linf8", "linf8-quick"]
    assert all(result.complete for result in results)


@pytest.mark.parametrize("name", ["chunk-0000.npz", "adversarial-0000.npy"])
def test_truncation_is_found(tmp_path, name):
    store, cell = CellStore(tmp_path), make_cell()
    fill(store, cell, adversarial=True)
    path = store.folder(cell) / name
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=rf"{name}.*run the same command again"):
            store.read_adversarial(cell, 0)
        if name.startswith("chunk"):
            with pytest.raises(BadInput, match=rf"{name}.*run the same command again"):
                _ = load_results(tmp_path)[0].frame


@pytest.mark.parametrize("name", ["chunk-0000.npz", "adversarial-0000.npy"])
def test_flipped_bytes_never_change_a_number(tmp_path, name):
    store, cell = CellStore(tmp_path), make_cell()
    fill(store, cell, adversarial=True)
    arrays, images = store.read(cell, 0), store.read_adversarial(cell, 0)
    path = store.folder(cell) / name
    whole, rng, caught = path.read_bytes(), np.random.default_rng(0), 0
    for position in rng.choice(len(whole), size=120, replace=False):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        try:
            found, seen = store.read(cell, 0), store.read_adversarial(cell, 0)
        except BadInput:
            caught += 1
            continue
        assert np.array_equal(seen, images)  # a zip holds bytes that carry no data: times, flags
        assert all(np.array_equal(found[key], arrays[key]) for key in arrays)
    assert caught > 60


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("margin"),
        lambda a: a.update(correct=a["correct"][:-1]),
        lambda a: a.update(correct=a["repeats"] + 1),
        lambda a: a.update(counts=a["counts"] + 1),
        lambda a: a.update(margin=a["margin"] * np.nan),
        lambda a: a.update(counts=a["repeats"]),
        *[lambda a, name=name: a.update({name: a[name].astype(float)}) for name in ("label", "correct", "repeats", "counts")],
    ],
)
def test_arrays_that_are_no_chunk_are_refused(tmp_path, change):
    store, cell = CellStore(tmp_path), make_cell()
    arrays = make_arrays(cell, 0)
    change(arrays)
    with pytest.raises(ValueError, match="chunk 0"):
        store.write(cell, 0, arrays)
    assert not store.has(cell, 0)


def test_attacked_images_are_float32(tmp_path):
    store, cell = CellStore(tmp_path), make_cell()
    with pytest.raises(ValueError, match="float32"):
        store.write(cell, 0, make_arrays(cell, 0), np.zeros((10, 1, 4, 4)))


def test_folders_that_are_no_cells_are_left_out_with_a_line(tmp_path):
    store, cell = CellStore(tmp_path), make_cell()
    fill(store, cell)
    runs = tmp_path / "runs"
    (runs / "notes").mkdir()
    (runs / "half").mkdir()
    (runs / "half" / "cell.json").write_text('{"format": 1, "iden')
    (runs / "renamed").mkdir()
    (runs / "renamed" / "cell.json").write_text((store.folder(cell) / "cell.json").read_text())
    (runs / "future").mkdir()
    (runs / "future" / "cell.json").write_text(json.dumps({"format": 99, "identity": {}, "labels": [{}]}))
    (runs / "deep").mkdir()
    (runs / "deep" / "cell.json").write_text("[" * 100_000)
    (runs / "other").mkdir()
    (runs / "other" / "cell.json").write_text("[1, 2]")
    lines = []
    assert len(load_results(tmp_path, warn=lines.append)) == 1
    text = "\n".join(lines)
    assert len(lines) == 6 and text.count("cannot be read") == 2
    for part in ("no cell.json", "cannot be read", "renamed or changed", "format 99", "not a description"):
        assert part in text


def test_no_results_are_no_error(tmp_path, capsys):
    assert load_results(tmp_path / "nothing") == []
    (tmp_path / "runs" / "odd").mkdir(parents=True)
    assert load_results(tmp_path) == []
    assert "left out" in capsys.readouterr().err


def test_only_one_holds_a_chunk(tmp_path):
    store, cell = CellStore(tmp_path), make_cell()
    with store.lock(cell, 0) as mine, store.lock(cell, 0) as second, store.lock(cell, 1) as other:
        assert (mine, second, other) == (True, False, True)
    with store.lock(cell, 0) as again:
        assert again
    assert list(store.folder(cell).iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_without_locks_everyone_may_work(tmp_path, monkeypatch, unlocked, code):
    unlocked(code)
    store, cell = CellStore(tmp_path), make_cell()
    with store.lock(cell, 0) as mine, store.lock(cell, 0) as second:
        assert mine and second
    assert list(store.folder(cell).iterdir()) == []


def test_an_unwritable_folder_is_one_error(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    store, cell = CellStore(tmp_path), make_cell()
    for act in (store.open, lambda c: store.lock(c, 0).__enter__(), lambda c: store.write(c, 0, make_arrays(c, 0))):
        with pytest.raises(RushBenchError, match="cannot write"):
            act(cell)


def _work(folder):
    store, cell = CellStore(folder), make_cell()
    big = np.zeros((10, 3, 64, 64), np.float32)
    while True:
        store.open(cell)
        for chunk in (0, 1):
            with store.lock(cell, chunk) as held:
                if held:
                    store.write(cell, chunk, make_arrays(cell, chunk), big)


def test_kill_at_any_moment_corrupts_nothing(tmp_path):
    store, cell = CellStore(tmp_path), make_cell()
    context = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    for _ in range(10):
        process = context.Process(target=_work, args=(tmp_path,))
        process.start()
        time.sleep(0.02 + 0.05 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for result in load_results(tmp_path, warn=lambda text: None):
            assert len(result.frame) == 10 * result.chunks_done
        for chunk in (0, 1):
            if store.has(cell, chunk):
                assert np.array_equal(store.read(cell, chunk)["counts"], make_arrays(cell, chunk)["counts"])
                assert store.read_adversarial(cell, chunk).shape == (10, 3, 64, 64)
            with store.lock(cell, chunk) as held:  # the dead hold nothing
                assert held
    fill(store, cell, adversarial=True)  # and what they left half-written goes
    assert store.result(cell).complete
    assert sorted(path.name for path in store.folder(cell).glob(".*")) == []


def crossed(store, cell, other):
    """Two machines without locks whose x' differ in a bit: the last to write x' is not the last to write the chunk."""
    fill(store, cell, adversarial=True)
    beside = store.folder(cell) / "adversarial-0001.npy"
    beside.write_bytes(other(beside.read_bytes()))


@pytest.mark.parametrize("other", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-4], lambda b: b"", lambda b: b + b"x"])
def test_a_chunk_beside_another_x_prime_is_not_done_and_heals(tmp_path, other):
    store, cell = CellStore(tmp_path), make_cell()
    crossed(store, cell, other)
    assert [store.has(cell, c) for c in range(3)] == [True, False, True]
    assert store.result(cell).chunks_done == load_results(tmp_path)[0].chunks_done == 2
    assert not store.result(cell).complete and len(store.result(cell).frame) == 15
    fill(store, cell, adversarial=True)
    assert store.result(cell).complete and len(store.read_adversarial(cell, 1)) == 10


def test_counts_stand_without_their_x_prime(tmp_path):
    store, cell = CellStore(tmp_path), make_cell()
    fill(store, cell, adversarial=True)
    for path in store.folder(cell).glob("adversarial-*.npy"):
        path.unlink()
    assert store.result(cell).complete and len(load_results(tmp_path)[0].frame) == N
    with pytest.raises(BadInput, match=r"delete chunk-0000\.npz beside it"):
        store.read_adversarial(cell, 0)


def as_published(path):
    """A chunk as it was written before chunks said whose they are."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "cell"}
    np.savez_compressed(path, **arrays)


CLEAN = {"attack": {"name": "clean"}, "threat": None}
SWAPS = {
    "another attack of the same images": ({}, {"attack": {"name": "apgd"}}, 0, 0),
    "the clean images": (CLEAN, {}, 0, 0),
    "an attack, as clean": ({}, CLEAN, 0, 0),
    "another place": ({}, {}, 0, 1),
    "another K": ({"repeats": 7}, {}, 0, 0),
    "another eps": ({"threat": {"norm": "linf", "eps": 0.5}}, {}, 0, 0),
    "another seed": ({"seed": 1}, {}, 0, 0),
    "a certificate": ({"attack": {"name": "certify"}}, {}, 0, 0),
}
OLD_AND_UNKNOWABLE = ("another attack of the same images", "another seed")  # where there is no x' beside it


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_chunk_of_another_cell_is_refused(tmp_path, swap, old):
    here, there, c, to = SWAPS[swap]
    store = CellStore(tmp_path)
    cells = [dataclasses.replace(make_cell(), identity=make_cell().identity | change) for change in (here, there)]
    for cell in cells:
        kind, eps = cell.identity["attack"]["name"], (cell.identity["threat"] or {"eps": 0})["eps"]
        store.open(cell)
        for chunk in range(cell.chunks):
            arrays = make_arrays(cell, chunk, repeats=cell.identity["repeats"])
            arrays["distance"] = np.full(len(arrays["index"]), eps if kind in ("pgd", "apgd") else 0.0)
            x = np.zeros((len(arrays["index"]), 1, 4, 4), np.float32)
            store.write(cell, chunk, arrays, x if kind in ("pgd", "apgd") else None)
    folders = [store.folder(cell) for cell in cells]
    if old:
        for path in tmp_path.glob("runs/*/chunk-*.npz"):
            as_published(path)
    assert all(len(result.frame) == N for result in load_results(tmp_path))
    (folders[1] / f"chunk-{to:04d}.npz").write_bytes((folders[0] / f"chunk-{c:04d}.npz").read_bytes())
    if old and swap in OLD_AND_UNKNOWABLE:
        return
    with pytest.raises(BadInput, match="run the same command again"):
        [result.frame for result in load_results(tmp_path)]


@pytest.mark.parametrize("change", [lambda a: a["index"] + 1, lambda a: a["index"][::-1].copy()])
def test_cells_of_the_same_images_agree_on_them(tmp_path, change):
    store = CellStore(tmp_path)
    one = make_cell()
    two = dataclasses.replace(one, identity=one.identity | {"seed": 1})
    fill(store, one)
    store.open(two)
    for chunk in range(two.chunks):
        arrays = make_arrays(two, chunk)
        store.write(two, chunk, arrays | {"index": change(arrays)})
    with pytest.raises(BadInput, match="other images or labels"):
        [result.frame for result in load_results(tmp_path)]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("labels", {"n": 10**12}),
        ("labels", {"n": 0}),
        ("labels", {"n": "many"}),
        ("labels", {"n": True}),
        ("labels", {"eps": "8/255"}),
        ("labels", {"eps": float("nan")}),
        ("labels", {"defense": ["a"]}),
        ("labels", {"deterministic": None}),
        ("identity", {"chunk": 0}),
        ("identity", {"chunk": 10**12}),
        ("identity", {"repeats": -1}),
        ("identity", {"seed": 2**70}),
        ("identity", {"seed": -1}),
        ("identity", {"attack": "pgd"}),
        ("identity", {"threat": 3}),
    ],
)
def test_an_absurd_cell_is_one_line(tmp_path, part, change):
    store, cell = CellStore(tmp_path), make_cell()
    fill(store, cell)
    said = json.loads((store.folder(cell) / "cell.json").read_text())
    (said[part] if part == "identity" else said[part][0]).update(change)
    folder = tmp_path / "runs" / digest(said["identity"])[:16]
    folder.mkdir(exist_ok=True)
    (folder / "cell.json").write_text(json.dumps(said))
    lines = []
    found = load_results(tmp_path, warn=lines.append)
    assert len(lines) == 1 and len(found) == (part == "identity")
