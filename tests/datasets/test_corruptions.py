"""CIFAR-10-C and CIFAR-100-C: small files in the official format, subsets that pair, damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rush_bench.datasets import load_dataset
from rush_bench.datasets.corruptions import ALL, EXTRA, SEVERITIES, USUAL, load_corrupted
from rush_bench.errors import BadInput

TWO = ("fog", "spatter")
COUNT = 40


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with `CIFAR-10-C`: pixel (0, 0) of an image holds its position, its severity and its corruption."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for k, corruption in enumerate(TWO):
        pixels = np.random.RandomState(k).randint(0, 256, (5 * COUNT, 32, 32, 3)).astype(np.uint8)
        pixels[:, 0, 0] = np.stack([np.tile(np.arange(COUNT), 5), np.repeat(SEVERITIES, COUNT), np.full(5 * COUNT, k)], axis=1)
        np.save(folder / f"{corruption}.npy", pixels)
    np.save(folder / "labels.npy", np.tile(np.arange(COUNT) % 10, 5).astype(np.uint8))
    return tmp_path


def test_names_are_the_official_files() -> None:
    assert (len(USUAL), len(EXTRA), len(set(ALL))) == (15, 4, 19)


@pytest.mark.parametrize("corruption", TWO)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_every_cell_holds_the_same_images(data: Path, corruption: str, severity: int) -> None:
    images = load_corrupted("cifar10", TWO, 20, data_dir=data).images(corruption, severity)
    expected = torch.stack([images.index, torch.full((20,), severity), torch.full((20,), TWO.index(corruption))], dim=1)
    assert torch.equal(images.pixels[:, :, 0, 0].long(), expected)
    raw = np.load(data / "CIFAR-10-C" / f"{corruption}.npy")[(severity - 1) * COUNT + int(images.index[3])]
    assert np.array_equal(images.pixels[3].numpy(), raw.transpose(2, 0, 1))
    assert torch.equal(images.labels, images.index % 10)
    assert images.labels.bincount().tolist() == [2] * 10  # stratified
    assert images.pixels.is_contiguous() and images.labels.dtype == torch.int64
    assert (images.name, images.split, len(images.classes)) == ("cifar10", f"{corruption}-{severity}", 10)


def test_subsets_nest_and_are_those_of_the_clean_test_set(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, more, whole = (load_corrupted("cifar10", TWO, n, seed=3, data_dir=data).positions for n in (7, 30, None))
    assert few.tolist() == more[:7].tolist() and whole.tolist() == list(range(COUNT))
    labels = np.arange(COUNT) % 10
    arrays = {"train_images": np.zeros((COUNT, 32, 32, 3), np.uint8), "train_labels": labels}
    arrays |= {"test_images": arrays["train_images"], "test_labels": labels, "classes": np.array(list("abcdefghij"))}
    np.savez(data / "cifar10.npz", **arrays)
    monkeypatch.setenv("RUSH_BENCH_DATA", str(data))
    assert load_dataset("cifar10", "test", 30, seed=3).index.tolist() == more.tolist()
    assert load_corrupted("cifar10", TWO, 30, seed=3).positions.tolist() == more.tolist()  # the same folder by environment


def test_pixels_are_not_read_before_they_are_asked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda path, **how: modes.append(how["mmap_mode"]) or load(path, **how))
    load_corrupted("cifar10", TWO, 5, data_dir=data).images("fog", 2)
    assert set(modes) == {"r"}


def test_cifar100(tmp_path: Path) -> None:
    (tmp_path / "CIFAR-100-C").mkdir()
    np.save(tmp_path / "CIFAR-100-C" / "frost.npy", np.zeros((500, 32, 32, 3), np.uint8))
    np.save(tmp_path / "CIFAR-100-C" / "labels.npy", np.tile(np.arange(100), 5))
    images = load_corrupted("cifar100", ("frost",), data_dir=tmp_path).images("frost", 5)
    assert len(images) == len(images.classes) == 100 and images.labels.tolist() == list(range(100))


def _rewrite(name: str, change):
    def spoil(folder: Path) -> None:
        np.save(folder / name, change(np.load(folder / name)))

    return spoil


def _cut(folder: Path) -> None:
    file = folder / "fog.npy"
    file.write_bytes(file.read_bytes()[:-1000])


def _archive(folder: Path) -> None:
    np.savez(folder / "other.npz", np.zeros(3))
    (folder / "other.npz").rename(folder / "fog.npy")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "fog.npy").unlink(), "no file .*fog.npy; unpack CIFAR-10-C.tar from https"),
        (lambda folder: (folder / "labels.npy").unlink(), "no file .*labels.npy; unpack.*--data-dir"),
        (lambda folder: (folder / "fog.npy").write_bytes(b""), "fog.npy cannot be read .*unpack"),
        (lambda folder: (folder / "fog.npy").write_bytes(b"<html>not found</html>"), "fog.npy cannot be read .*unpack"),
        (_cut, "fog.npy cannot be read .*cut.*unpack"),
        (_archive, "fog.npy cannot be read .*archive.*unpack"),
        (_rewrite("fog.npy", lambda a: a[:-COUNT]), r"fog.npy holds uint8 \(160, 32, 32, 3\), not .*\(200, 32, 32, 3\)"),
        (_rewrite("fog.npy", lambda a: a.transpose(0, 3, 1, 2)), r"fog.npy holds uint8 \(200, 3, 32, 32\)"),
        (_rewrite("fog.npy", lambda a: a / 255), "fog.npy holds float64"),
        (_rewrite("fog.npy", lambda a: a[:, :16, :16]), r"fog.npy holds uint8 \(200, 16, 16, 3\)"),
        (_rewrite("labels.npy", lambda a: a[:-1]), "labels.npy holds uint8 of shape"),
        (_rewrite("labels.npy", lambda a: a.astype(float)), "labels.npy holds float64"),
        (_rewrite("labels.npy", lambda a: a + 5), "labels.npy: image 5 has label 10"),
        (_rewrite("labels.npy", lambda a: np.roll(a, 1) + (np.arange(len(a)) > 150)), "other labels at one severity"),
    ],
)
def test_a_damaged_file_is_bad_input_before_anything_runs(data: Path, spoil, says: str) -> None:
    spoil(data / "CIFAR-10-C")
    with pytest.raises(BadInput, match=says):
        load_corrupted("cifar10", TWO, data_dir=data)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("stl10", TWO), "choose cifar10 or cifar100"),
        (("cifar10", ("fogg",)), "did you mean 'fog'"),
        (("cifar10", TWO, 41), "ask for 1 to 40"),
        (("cifar10", TWO, 0), "ask for 1 to 40"),
        (("cifar100", TWO), "CIFAR-100-C.tar from https://zenodo.org/record/3555552"),
    ],
)
def test_bad_requests(data: Path, args: tuple, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        load_corrupted(*args, data_dir=data)


def test_bad_cells(data: Path) -> None:
    corrupted = load_corrupted("cifar10", ("fog",), data_dir=data)
    with pytest.raises(BadInput, match="severity 6"):
        corrupted.images("fog", 6)
    with pytest.raises(BadInput, match="no corruption named 'spatter'"):
        corrupted.images("spatter", 1)
