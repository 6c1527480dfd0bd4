"""CIFAR and STL-10: small files in the official formats, and what happens without file and without network."""

import hashlib
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets

from rush_bench.datasets import load_dataset
from rush_bench.errors import BadInput

ACCEPTED = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


def write_cifar_npz(folder: Path, name: str = "cifar10", count: int = 50) -> np.ndarray:
    pixels = np.random.RandomState(0).randint(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(count) % 10
    np.savez(
        folder / f"{name}.npz",
        train_images=pixels,
        train_labels=labels,
        test_images=pixels[::-1],
        test_labels=labels[::-1],
        classes=np.array([f"class {k}" for k in range(10)]),
        stand_in_train=np.array([1]),
        stand_in_test=np.array([4, 9]),
    )
    return pixels


def write_cifar_pickles(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> dict[str, np.ndarray]:
    """torchvision's files with few images; torchvision is told their checksums."""
    kind: Any = ACCEPTED[name]
    key, meta_key = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")
    (folder / kind.base_folder).mkdir(parents=True)
    random = np.random.RandomState(1)

    def write(file: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (folder / kind.base_folder / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    batches: dict[str, np.ndarray] = {}
    lists = {}
    for attribute in ("train_list", "test_list"):
        lists[attribute] = []
        for file, _ in getattr(kind, attribute):
            batches[file] = random.randint(0, 256, (20, 3072)).astype(np.uint8)
            lists[attribute].append(write(file, {"data": batches[file], key: [k % 10 for k in range(20)]}))
        monkeypatch.setattr(kind, attribute, lists[attribute])
    filename, md5 = write(kind.meta["filename"], {meta_key: [f"name {k}" for k in range(10)]})
    monkeypatch.setattr(kind, "meta", {"filename": filename, "key": meta_key, "md5": md5})
    return batches


def write_stl10(folder: Path, train: int = 40, test: int = 20, unlabelled: int = 30) -> dict[str, np.ndarray]:
    """STL-10's binary format by its definition: channel after channel, column after column; labels 1 to 10."""
    (folder / "stl10_binary").mkdir(parents=True)
    random, images = np.random.RandomState(2), {}
    for part, count in (("train", train), ("test", test), ("unlabeled", unlabelled)):
        images[part] = random.randint(0, 256, (count, 3, 96, 96)).astype(np.uint8)
        columns = bytearray()
        for image in images[part]:
            for channel in image:
                for column in range(96):
                    columns += channel[:, column].tobytes()
        (folder / "stl10_binary" / f"{part}_X.bin").write_bytes(columns)
        if part != "unlabeled":
            (folder / "stl10_binary" / f"{part}_y.bin").write_bytes(bytes(1 + k % 10 for k in range(count)))
    return images


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every download leaves a half-written file and fails, as a cut line does; returns the list of calls."""
    calls: list[str] = []

    def broken(url: str, filename: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(url)
        Path(filename).write_bytes(b"half")
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", broken)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **kwargs: url)
    return calls


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_takes_the_npz_first_and_leaves_stand_ins_out_of_the_test(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    pixels = write_cifar_npz(tmp_path, name)
    test = load_dataset(name, data_dir=tmp_path)
    assert test.name == name and len(test) == 48 and not {4, 9} & set(test.index.tolist())
    assert np.array_equal(test.pixels.numpy(), pixels[::-1].transpose(0, 3, 1, 2)[test.index])
    assert len(load_dataset(name, data_dir=tmp_path, stand_ins=True)) == 50
    assert (len(load_dataset(name, "train", data_dir=tmp_path)), len(load_dataset(name, "val", data_dir=tmp_path))) == (
        45,
        5,
    )
    monkeypatch.setenv("RUSH_BENCH_DATA", str(tmp_path))
    assert load_dataset(name).digest == test.digest
    assert not no_network


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_reads_torchvisions_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    batches = write_cifar_pickles(monkeypatch, tmp_path, name)
    test = load_dataset(name, data_dir=tmp_path)
    file = "test_batch" if name == "cifar10" else "test"
    assert np.array_equal(test.pixels.numpy(), batches[file].reshape(-1, 3, 32, 32))
    assert test.classes[3] == "name 3" and test.labels.tolist() == [k % 10 for k in range(20)]
    train, val = (load_dataset(name, split, data_dir=tmp_path) for split in ("train", "val"))
    assert len(train) + len(val) == 20 * (len(batches) - 1) and not no_network


def test_a_damaged_torchvision_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar_pickles(monkeypatch, tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(BadInput, match="cifar-10-batches-py is incomplete or damaged; delete it"):
        load_dataset("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("cifar10", "cifar10.npz .*cifar-10-batches-py"), ("cifar100", "cifar-100-python"), ("stl10", "stl10_binary")],
)
@pytest.mark.parametrize("exists", [True, False])
def test_without_network_one_error_says_what_to_put_where(
    name: str, advice: str, exists: bool, tmp_path: Path, no_network: list[str]
) -> None:
    folder = tmp_path / "data"
    if exists:
        folder.mkdir()
    with pytest.raises(BadInput, match=f"{name} is not in .*data.*no route.*Put .*{advice}") as caught:
        load_dataset(name, data_dir=folder)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert no_network and (list(folder.iterdir()) == [] if exists else not folder.exists())


def test_a_download_is_moved_into_place_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What torchvision downloads ends in the data folder, with nothing else; what it prints is not on stdout."""
    source = tmp_path / "elsewhere"
    batches = write_cifar_pickles(monkeypatch, source, "cifar10")

    def download(self: Any) -> None:
        print("torchvision says so")
        (source / self.base_folder).rename(Path(self.root) / self.base_folder)

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    images = load_dataset("cifar10", data_dir=tmp_path / "data")
    assert np.array_equal(images.pixels.numpy(), batches["test_batch"].reshape(-1, 3, 32, 32))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]
    printed = capsys.readouterr()
    assert printed.out == "" and "torchvision says so" in printed.err


def test_stl10_at_96_is_the_file_pixel_by_pixel(tmp_path: Path) -> None:
    written = write_stl10(tmp_path)
    train, val, test = (load_dataset("stl10", s, data_dir=tmp_path, size=96) for s in ("train", "val", "test"))
    assert np.array_equal(test.pixels.numpy(), written["test"])
    assert test.labels.tolist() == [k % 10 for k in range(20)] and test.classes[0] == "airplane"
    assert (len(train), len(val)) == (36, 4) and not set(train.index.tolist()) & set(val.index.tolist())
    assert np.array_equal(train.pixels.numpy(), written["train"][train.index])


def test_stl10_agrees_with_torchvisions_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    theirs = torchvision.datasets.STL10(str(tmp_path), split="test")
    ours = load_dataset("stl10", data_dir=tmp_path, size=96)
    assert np.array_equal(ours.pixels.numpy(), theirs.data) and ours.labels.tolist() == theirs.labels.tolist()


def test_stl10_is_resized_to_32_and_pretrains_on_the_unlabelled(tmp_path: Path) -> None:
    written = write_stl10(tmp_path)
    images = load_dataset("stl10", "pretrain", data_dir=tmp_path)
    assert images.shape == (3, 32, 32) and len(images) == 30 and set(images.labels.tolist()) == {-1}
    # 96 to 32 with antialiasing weighs five pixels in each direction by 1, 2, 3, 2, 1 ninths; away from the border.
    weights = np.array([1, 2, 3, 2, 1]) / 9
    window = written["unlabeled"][:, :, 29:34, 59:64].astype(float)  # around output pixel (10, 20)
    expected = np.einsum("nchw,h,w->nc", window, weights, weights)
    assert np.abs(expected - images.pixels[:, :, 10, 20].numpy()).max() <= 0.5 + 1e-3
    some = load_dataset("stl10", "pretrain", n=7, data_dir=tmp_path)
    assert torch.equal(some.pixels, images.pixels[some.index])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("test_X.bin", lambda data: data[:-1], "test_X.bin was cut"),
        ("test_X.bin", lambda data: b"", "test_X.bin was cut"),
        ("test_y.bin", lambda data: data[:-1], "test_y.bin has 19 labels for 20 images"),
        ("test_y.bin", lambda data: data[:5] + b"\x0b" + data[6:], "test_y.bin: image 5 has label 10"),
        ("test_y.bin", lambda data: data[:3] + b"\x00" + data[4:], "test_y.bin: image 3 has label -1"),
        ("test_y.bin", None, "has no test_y.bin"),
        ("test_X.bin", None, "has no test_X.bin"),
    ],
)
def test_a_bad_stl10_file_is_named(tmp_path: Path, file: str, change: Any, message: str, no_network: list[str]) -> None:
    write_stl10(tmp_path, train=2, unlabelled=1)
    path = tmp_path / "stl10_binary" / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadInput, match=message):
        load_dataset("stl10", data_dir=tmp_path)
    assert not no_network
