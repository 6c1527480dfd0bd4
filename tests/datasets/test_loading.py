import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from rush_bench import registry
from rush_bench.datasets import Part, Source, load_dataset
from rush_bench.errors import BadInput


def write_npz(path: Path, side: int = 6, **changes: object) -> dict[str, np.ndarray]:
    """Write 40 training and 20 test images of 4 classes in the documented form; changes replace keys, None drops."""
    random = np.random.RandomState(0)
    arrays: dict[str, object] = {
        "train_images": random.randint(0, 256, (40, side, side, 3)).astype(np.uint8),
        "train_labels": np.arange(40) % 4,
        "test_images": random.randint(0, 256, (20, side, side, 3)).astype(np.uint8),
        "test_labels": np.arange(20) % 4,
        "classes": np.array(["ant", "bee", "cat", "dog"]),
        "stand_in_train": np.array([5]),
        "stand_in_test": np.array([0, 7]),
        **changes,
    }
    kept = {key: np.asarray(value) for key, value in arrays.items() if value is not None}
    np.savez(path, **kept)  # type: ignore[arg-type]
    return kept


def test_digits_are_scikit_learns_and_every_image_is_in_one_split() -> None:
    splits = {split: load_dataset("digits", split, size=8) for split in ("train", "val", "test")}
    assert {split: len(images) for split, images in splits.items()} == {"train": 1167, "val": 130, "test": 500}
    together = torch.cat([images.pixels for images in splits.values()]).flatten(1).tolist()
    official = np.rint(load_digits().images * 255 / 16).astype(np.uint8).reshape(1797, 64).tolist()
    assert sorted(together) == sorted(official)
    assert splits["test"].classes == tuple("0123456789") and splits["test"].name == "digits"
    assert load_dataset("digits", "pretrain", size=8).digest == splits["train"].digest


def test_digits_at_16_are_the_bilinear_enlargement_of_the_scans() -> None:
    images, scans = load_dataset("digits", "test"), load_dataset("digits", "test", size=8)
    assert images.shape == (1, 16, 16)
    # Bilinear by hand: output pixel 2k + 1 looks at k + 0.75, a quarter of the way from k + 0.5 to k + 1.5.
    scan = np.pad(scans.pixels[:, 0].double().numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
    even, odd = 0.25 * scan[:, :-2] + 0.75 * scan[:, 1:-1], 0.75 * scan[:, 1:-1] + 0.25 * scan[:, 2:]
    tall = np.stack([even, odd], 2).reshape(500, 16, 10)
    even, odd = 0.25 * tall[:, :, :-2] + 0.75 * tall[:, :, 1:-1], 0.75 * tall[:, :, 1:-1] + 0.25 * tall[:, :, 2:]
    assert np.abs(np.stack([even, odd], 3).reshape(500, 16, 16) - images.pixels[:, 0].numpy()).max() <= 0.5 + 1e-4


def test_the_splits_of_digits_are_the_same_for_ever() -> None:
    assert load_dataset("digits", "test").digest.startswith("719919bae78087b2")
    assert load_dataset("digits", "train", n=50).digest.startswith("e0554dc21b374728")


def test_subsets_are_nested_stratified_and_seeded() -> None:
    small, large = load_dataset("digits", "test", n=100), load_dataset("digits", "test", n=300)
    assert torch.equal(large.index[:100], small.index) and torch.equal(large.pixels[:100], small.pixels)
    assert small.labels.bincount().sub(10).abs().max() <= 1
    assert len(set(small.index.tolist())) == 100
    assert load_dataset("digits", "test", n=100, seed=1).index.tolist() != small.index.tolist()
    whole = load_dataset("digits", "test")
    assert torch.equal(whole.pixels[small.index], small.pixels) and torch.equal(whole.labels[small.index], small.labels)


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    arrays = write_npz(tmp_path / "pets.npz")
    everything = load_dataset(str(tmp_path / "pets.npz"), "test", stand_ins=True)
    assert (everything.name, everything.split, everything.shape) == ("pets", "test", (3, 6, 6))
    assert everything.classes == ("ant", "bee", "cat", "dog")
    assert np.array_equal(everything.pixels.numpy(), arrays["test_images"].transpose(0, 3, 1, 2))
    official = load_dataset(str(tmp_path / "pets.npz"))
    assert official.index.tolist() == [row for row in range(20) if row not in (0, 7)]
    assert torch.equal(official.pixels, everything.pixels[official.index])
    train, val = (load_dataset(str(tmp_path / "pets.npz"), split) for split in ("train", "val"))
    assert len(val) == 4 and sorted([*train.index.tolist(), *val.index.tolist()]) == list(range(40))
    assert 5 in train.index and val.labels.sort().values.tolist() == [0, 1, 2, 3]
    assert np.array_equal(train.pixels.numpy(), arrays["train_images"].transpose(0, 3, 1, 2)[train.index])


def test_unlabelled_images_are_what_pretraining_sees(tmp_path: Path) -> None:
    unlabelled = np.random.RandomState(1).randint(0, 256, (30, 6, 6, 3)).astype(np.uint8)
    write_npz(tmp_path / "pets.npz", unlabeled_images=unlabelled)
    images = load_dataset(str(tmp_path / "pets.npz"), "pretrain")
    assert np.array_equal(images.pixels.numpy(), unlabelled.transpose(0, 3, 1, 2))
    assert set(images.labels.tolist()) == {-1}
    some = load_dataset(str(tmp_path / "pets.npz"), "pretrain", n=10)
    assert torch.equal(some.pixels, images.pixels[some.index]) and some.index.tolist() != list(range(10))


def test_resizing_is_antialiased_and_keeps_flat_images(tmp_path: Path) -> None:
    stripes = np.zeros((20, 12, 12, 3), np.uint8)
    stripes[:, :, ::2] = 200
    stripes[3] = 77
    write_npz(tmp_path / "pets.npz", test_images=stripes)
    small = load_dataset(str(tmp_path / "pets.npz"), size=3, stand_ins=True).pixels
    assert small.shape == (20, 3, 3, 3) and set(small[3].unique().tolist()) == {77}
    assert (small[1].float() - 100).abs().max() < 15  # without antialiasing stripes would stay 0 or 200


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"test_labels": None}, "test", "has no test_labels"),
        ({"train_images": None, "train_labels": None}, "val", "has no train_images and no train_labels"),
        ({"classes": None}, "test", "has no classes"),
        ({"test_images": np.zeros((20, 6, 6, 3))}, "test", "images are float64, not uint8"),
        ({"test_images": np.zeros((20, 6, 6, 4), np.uint8)}, "test", r"shape \(20, 6, 6, 4\)"),
        ({"test_labels": np.arange(19) % 4}, "test", r"shape \(19,\).*shape \(20,\)"),
        ({"test_labels": np.full(20, 0.5)}, "test", "labels are float64"),
        ({"test_labels": np.where(np.arange(20) == 11, 4, 0)}, "test", "image 11 has label 4, outside the 4 classes"),
        ({"train_labels": np.where(np.arange(40) == 2, -3, 0)}, "train", "image 2 has label -3"),
        ({"stand_in_test": np.array([0.5])}, "test", "stand_in_test holds float64"),
        ({"classes": np.array(["a", None, "b", "c"], object)}, "test", "cannot be read"),
        (
            {"classes": np.array(list("abcd"), object)},
            "test",
            r"classes cannot.*of dtype object.*save it as classes.astype\(str\)$",
        ),
        ({"test_labels": (np.arange(20) % 4).astype(object)}, "test", r"of dtype object.*test_labels.astype\('int64'\)$"),
        ({"test_images": np.zeros((20, 6, 6, 3)).astype(object)}, "test", r"test_images .*of dtype object.*np.stack\("),
        ({"stand_in_train": np.array([3], object)}, "train", r"of dtype object.*stand_in_train.astype\('int64'\)$"),
        ({"classes": 4}, "test", "classes is the single value 4; save the names of the classes"),
        ({"stand_in_test": np.array([3, -1])}, "test", r"stand_in_test holds the position -1, .*20 images \(0 to 19\)"),
        ({"stand_in_train": np.array([[39, 40]])}, "train", "stand_in_train holds the position 40, .*40 images"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, changes: dict[str, object], split: str, message: str) -> None:
    write_npz(tmp_path / "pets.npz", **changes)
    with pytest.raises(BadInput, match=rf"pets\.npz.*{message}"):
        load_dataset(str(tmp_path / "pets.npz"), split)


def test_names_of_classes_may_be_bytes(tmp_path: Path) -> None:
    names = ["ant", "bée", "cat", "dog"]
    write_npz(tmp_path / "pets.npz", classes=np.array([name.encode() for name in names]))
    assert load_dataset(str(tmp_path / "pets.npz")).classes == tuple(names)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_single_class_is_refused_but_for_pretraining(tmp_path: Path, split: str) -> None:
    one = {"train_labels": np.zeros(40, int), "test_labels": np.zeros(20, int), "classes": np.array(["ant"])}
    write_npz(tmp_path / "pets.npz", **one)
    with pytest.raises(BadInput, match=r"pets\.npz has the single class 'ant'.*at least 2"):
        load_dataset(str(tmp_path / "pets.npz"), split)
    assert len(load_dataset(str(tmp_path / "pets.npz"), "transfer")) == 40


@pytest.mark.parametrize("keep", [0, 40, 0.3, 0.9, 0.999])
def test_a_cut_file_is_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "pets.npz"
    write_npz(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(BadInput, match=r"pets\.npz cannot be read.*write it again"):
        load_dataset(str(path))


def test_a_changed_byte_in_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "pets.npz"
    pixels = write_npz(path)["test_images"].tobytes()
    whole = bytearray(path.read_bytes())
    whole[whole.index(pixels) + 100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="cannot be read"):
        load_dataset(str(path))


def test_another_kind_of_file_and_a_missing_one(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(
        BadInput, match=r"array\.npz cannot be read as \.npz: it is one array \(\.npy\); write all the keys with numpy\.savez"
    ):
        load_dataset(str(tmp_path / "array.npz"))
    with pytest.raises(BadInput, match=r"no file .*absent\.npz"):
        load_dataset(str(tmp_path / "absent.npz"))


def test_wrong_names_splits_and_sizes() -> None:
    with pytest.raises(BadInput, match="no dataset named 'digit'; did you mean 'digits'"):
        load_dataset("digit")
    with pytest.raises(BadInput, match="no split named 'tset'; did you mean 'test'"):
        load_dataset("digits", "tset")
    with pytest.raises(BadInput, match="size 0"):
        load_dataset("digits", size=0)
    with pytest.raises(BadInput, match=r"501 images asked for.*500 for 'test'.*1 to 500"):
        load_dataset("digits", n=501)
    with pytest.raises(BadInput, match="0 images asked for"):
        load_dataset("digits", n=0)


def _read_flags(part: str, folder: Path) -> Part | None:
    if part == "unlabelled":
        return None
    pixels = np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4)
    return Part(pixels, None if folder.name == "unlabelled" else np.arange(20) % 2, ("x", "o"), "flags")


flags = Source("flags", _read_flags, size=2)


def test_a_data_set_from_another_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def points(group: str) -> list[importlib.metadata.EntryPoint]:
        return [
            importlib.metadata.EntryPoint("flags", f"{__name__}:flags", group),
            importlib.metadata.EntryPoint("wrong", "math:pi", group),
        ]

    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: {"flags": flags, "wrong": 3.14}[self.name])
    monkeypatch.setattr(registry, "datasets", registry.Registry("datasets"))
    images = load_dataset("flags", "train", data_dir=tmp_path)
    assert len(images) == 18 and images.shape == (1, 2, 2) and images.name == "flags"
    with pytest.raises(BadInput, match="'wrong' is a float"):
        load_dataset("wrong")
    with pytest.raises(BadInput, match="flags: no labels"):
        load_dataset("flags", "val", data_dir=tmp_path / "unlabelled")


def test_a_file_of_other_levels_is_refused(tmp_path) -> None:
    """Digits of 0 to 16, saved as they come from scikit-learn."""
    pixels, labels = np.full((12, 8, 8), 16, np.uint8), np.arange(12) % 3
    np.savez(tmp_path / "own.npz", test_images=pixels, test_labels=labels, classes=np.array(["a", "b", "c"]))
    with pytest.raises(BadInput, match="brightest pixel of 12 images is 16"):
        load_dataset(str(tmp_path / "own.npz"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({"n": n}, "n .* whole number of images") for n in (2.5, "10", True)),
        *(({"size": size}, "whole numbers of at least 1 pixel") for size in (16.0, "16", (16, 8.0), (16,), True, (16, 0))),
        *(({"n": 5, "seed": seed}, "seed .* whole number") for seed in (1.5, "1", None)),
    ],
)
def test_numbers_that_are_none_are_refused(options, says) -> None:
    with pytest.raises(BadInput, match=says):
        load_dataset("digits", **options)


def test_numbers_of_numpy_are_taken() -> None:
    asked = load_dataset("digits", n=np.int64(5), seed=np.int64(1), size=np.int64(8))
    assert asked.digest == load_dataset("digits", n=5, seed=1, size=8).digest
