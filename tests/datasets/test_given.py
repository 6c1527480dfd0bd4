"""`as_data` and folders: what people have at hand is read where it means one thing, and refused with the way out otherwise."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from rush_bench.datasets import as_data, as_images, load_dataset
from rush_bench.errors import BadInput

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 9, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3
TENSOR = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)


class Items(Dataset):
    """Items (image, label), the image as `make` has it."""

    classes = ("ant", "bee", "cat")

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, position):
        if position >= len(self):
            raise IndexError
        return self.make(PIXELS[position]), LABELS[position]


class Stream(IterableDataset):
    def __iter__(self):
        yield TENSOR[0], 0


def pil(pixels):
    return Image.fromarray(pixels)


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


GIVEN = {
    "images": lambda: as_images(PIXELS, LABELS),
    "pair of arrays": lambda: (PIXELS, LABELS),
    "pair of tensors": lambda: [TENSOR / 255, torch.from_numpy(LABELS)],
    "TensorDataset": lambda: TensorDataset(TENSOR / 255, torch.from_numpy(LABELS)),
    "DataLoader": lambda: DataLoader(TensorDataset(TENSOR, torch.from_numpy(LABELS)), batch_size=5),
    "shuffled": lambda: DataLoader(Items(tensor), batch_size=5, shuffle=True),
    "PIL": lambda: Items(pil),
    "tensors": lambda: Items(tensor),
    "subset": lambda: DataLoader(Subset(Items(pil), range(12))),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_every_form_gives_the_same_images(kind):
    images = as_data(GIVEN[kind]())
    assert torch.equal(images.pixels, TENSOR) and images.labels.tolist() == LABELS.tolist()
    assert images.index.tolist() == list(range(12)) and len(images.classes) == 3
    assert images.classes == (Items.classes if kind in ("PIL", "tensors", "shuffled") else ("0", "1", "2"))


def noisy(pixels):
    return tensor(pixels) * torch.rand(())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, r"data= takes rb.load_dataset.*not nothing"),
        (7, "not int"),
        ({"x": PIXELS}, "not dict"),
        (Stream(), "not Stream"),
        (TensorDataset(TENSOR), "not of 1 tensors"),
        (DataLoader(Items(pil), sampler=SubsetRandomSampler([1, 2])), "Subset"),
        (DataLoader(Items(tensor), batch_sampler=BatchSampler(SubsetRandomSampler([1, 2]), 2, False)), "Subset"),
        (DataLoader(Items(tensor), batch_sampler=[[0, 1], [4]]), "by a list"),
        (DataLoader(Items(tensor), collate_fn=lambda items: default_collate([(1 - x, y) for x, y in items])), "collate_fn"),
        (Items(noisy), "augmentation"),
        (Items(lambda pixels: tensor(pixels).flip(-1) if torch.rand(()) < 0.5 else tensor(pixels)), "augmentation"),
        (Subset(TensorDataset(TENSOR, torch.from_numpy(LABELS + 0.5)), range(12)), "whole numbers.*0.5.* is not"),
        (Items(lambda pixels: 2 * tensor(pixels) - 1), r"outside \[0,1\]"),
        (Items(lambda pixels: "cat"), "are str"),
        (Items(lambda pixels: pil(np.dstack([pixels, pixels[..., 0]]))), "items is transparent"),
        (Items(lambda pixels: pil(pixels[: 4 + pixels[0, 0, 0] % 2])), "2 shapes"),
        (Subset(Items(pil), []), "no images"),
        ([(TENSOR[0], "cat"), (TENSOR[1], "dog")], "are no arrays"),
        (([PIXELS[0], PIXELS[1, :4]], [0, 1]), "images of one shape"),
        ("cifar11", "did you mean 'cifar10'"),
        ("no/such/folder", "no dataset named"),
    ],
)
def test_anything_else_says_what_is_taken(given, says):
    with pytest.raises(BadInput, match=says):
        as_data(given)


def folder(root, positions=range(12), mode="RGB"):
    for position in positions:
        place = root / Items.classes[LABELS[position]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[position]).convert(mode).save(place / f"{position:02}.png")
    return root


def test_a_folder_of_images(tmp_path):
    images = load_dataset(str(folder(tmp_path / "mine")))
    order = np.argsort(LABELS, kind="stable")
    assert torch.equal(images.pixels, TENSOR[order]) and images.labels.tolist() == LABELS[order].tolist()
    assert (images.classes, images.name) == (Items.classes, "mine")
    assert as_data(tmp_path / "mine").digest == images.digest
    for mode in ("L", "LA"):
        assert load_dataset(str(folder(tmp_path / mode, mode=mode))).shape == (1, 6, 9)
    with pytest.raises(BadInput, match="no folder `train`"):
        load_dataset(str(tmp_path / "mine"), "train")


def test_a_folder_with_parts(tmp_path):
    folder(tmp_path / "train", range(9))
    with pytest.raises(BadInput, match="neither `test` nor `val`"):
        load_dataset(str(tmp_path))
    folder(tmp_path / "val", range(9, 12))
    assert len(load_dataset(str(tmp_path))) == 3
    assert len(load_dataset(str(tmp_path), "train")) + len(load_dataset(str(tmp_path), "val")) == 9


@pytest.mark.parametrize("empty", [False, True])
def test_a_label_counts_the_classes_that_training_had(tmp_path, empty):
    """A class without test images moves no label; one that training did not have is refused."""
    folder(tmp_path / "train", range(9))
    folder(tmp_path / "test", [9, 11])
    if empty:
        (tmp_path / "test" / "bee").mkdir()
    for path in (tmp_path, tmp_path / "test"):
        images = load_dataset(str(path))
        assert images.labels.tolist() == [0, 2] and images.classes == Items.classes
    (tmp_path / "test" / "cow").mkdir()
    with pytest.raises(BadInput, match=r"has classes that .*train has not: cow"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("fault", ["empty", "no classes", "damaged", "sixteen bits"])
def test_a_folder_at_fault_names_it(tmp_path, fault):
    (tmp_path / "ant").mkdir()
    if fault == "no classes":
        (tmp_path / "ant").rmdir()
    elif fault == "damaged":
        (tmp_path / "ant" / "1.png").write_bytes(b"not a picture")
    elif fault == "sixteen bits":
        Image.fromarray(np.full((4, 5), 40000, np.uint16)).save(tmp_path / "ant" / "1.png")
    with pytest.raises(BadInput, match=r"bits" if fault == "sixteen bits" else str(tmp_path)) as error:
        load_dataset(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training_set", "test_set"),
        ("TRAINING", "Testing"),
        ("train set", "validation"),
        ("trainset", "Valid"),
    ],
)
def test_the_parts_may_have_their_usual_other_names(tmp_path, monkeypatch, train, test):
    folder(tmp_path / train, range(9))
    with pytest.raises(BadInput, match=rf"folder `{train}` and neither `test` nor `val`"):
        load_dataset(str(tmp_path))
    folder(tmp_path / test, [9, 11])
    for place, path in ((tmp_path, str(tmp_path)), (tmp_path, str(tmp_path / test)), (tmp_path / test, ".")):
        monkeypatch.chdir(place)
        images = load_dataset(path)
        assert images.labels.tolist() == [0, 2] and images.classes == Items.classes
        assert torch.equal(images.pixels, TENSOR[[9, 11]])
    assert len(load_dataset(str(tmp_path), "train")) + len(load_dataset(str(tmp_path), "val")) == 9
    folder(tmp_path / "training images", range(9))
    with pytest.raises(BadInput, match="either of which may be `train`; rename one"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("names", [("invalid", "valid"), ("Bus", "Train"), ("testament", "trainer", "values")])
def test_a_class_may_be_called_as_parts_are(tmp_path, names):
    for position, name in enumerate(names):
        folder(tmp_path / "given", [position])
        (tmp_path / "given" / Items.classes[position]).rename(tmp_path / "given" / name)
    images = load_dataset(str(tmp_path / "given"))
    assert images.classes == names and torch.equal(images.pixels, TENSOR[: len(names)])


@pytest.mark.parametrize("names", [("first", "second"), ("first", "test_set"), ("train/first", "train/second")])
def test_folders_of_classes_are_no_classes(tmp_path, monkeypatch, names):
    """torchvision looks for a class's images in its folders' folders, too, and has two classes of three here."""
    for name in names:
        folder(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path), "."):
        with pytest.raises(BadInput, match=rf"{names[0]} holds no images.*name the folders train/<class>/\*.png"):
            load_dataset(path, "train" if "train" in names[0] else "test")


@pytest.mark.parametrize("inside", ["one more", "all"])
def test_a_class_may_have_folders(tmp_path, monkeypatch, inside):
    """Some images deeper than others, or every class's in one folder of it, as in Tiny ImageNet's `train`."""
    folder(tmp_path)
    for name in Items.classes:
        (tmp_path / name / "images").mkdir()
        for file in sorted((tmp_path / name).glob("*.png"))[-1 if inside == "one more" else 0 :]:
            file.rename(tmp_path / name / "images" / file.name)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path), "."):
        assert torch.equal(load_dataset(path).pixels, TENSOR[np.argsort(LABELS, kind="stable")])


def test_what_begins_with_a_dot_is_left_out(tmp_path):
    for part in ("train", "test"):
        images = load_dataset(str(folder(tmp_path / part)))
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
        (tmp_path / part / "ant" / "._00.png").write_bytes(b"Mac OS X")
        (tmp_path / part / "ant" / ".ipynb_checkpoints").mkdir()
        Image.fromarray(PIXELS[1]).save(tmp_path / part / "ant" / ".ipynb_checkpoints" / "00-checkpoint.png")
    assert load_dataset(str(tmp_path)).digest == images.digest
    assert load_dataset(str(tmp_path)).classes == Items.classes
    assert len(load_dataset(str(tmp_path), "train")) + len(load_dataset(str(tmp_path), "val")) == 12


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("alpha", [255, 254, 0])
def test_only_opaque_images_are_taken(tmp_path, mode, alpha):
    """Without its alpha, white ink on nothing is a white square."""
    place = folder(tmp_path, mode="L")
    pixels, layer = np.full((6, 9), 77, np.uint8), np.full((6, 9), 255, np.uint8)
    pixels[2, 3], layer[2, 3] = 0, alpha
    picture = Image.fromarray(pixels).convert(mode)
    if mode == "P":
        picture.save(place / "bee" / "04.png", transparency=bytes([alpha]))  # of the palette's first colour
    else:
        picture.putalpha(Image.fromarray(layer))
        picture.save(place / "bee" / "04.png")
    if alpha == 255:
        images = load_dataset(str(place))
        assert np.array_equal(images.pixels[images.labels == 1][1, 0], pixels)
    else:
        with pytest.raises(BadInput, match=r"bee/04.png is transparent in places.*alpha_composite"):
            load_dataset(str(place))


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 3, 6, 8])
def test_only_upright_images_are_taken(tmp_path, kind, orientation):
    """PIL turns a TIFF itself; what a viewer shows upright, torchvision's loader reads as it is stored."""
    picture, exif = Image.fromarray(PIXELS[0]), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    for name in Items.classes[:2]:
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / f"0.{kind}", exif=exif)
    if kind == "tif" or orientation in (None, 0, 1):
        shape = (3, 9, 6) if orientation in (6, 8) else (3, 6, 9)
        assert load_dataset(str(tmp_path)).shape == shape
    else:
        with pytest.raises(BadInput, match=rf"ant/0.{kind} is to be turned or mirrored .*exif_transpose"):
            load_dataset(str(tmp_path))


@pytest.mark.parametrize("shape", [(10**9, 10**9), (10**12,), (2**62, 4), (3, 6, 9, 3)])
@pytest.mark.parametrize("key", ["test_images", "test_labels", "classes"])
def test_an_array_that_declares_another_size_is_refused_at_once(tmp_path, shape, key):
    arrays = {"test_images": PIXELS, "test_labels": LABELS, "classes": np.array(["a", "b", "c"])}
    path = tmp_path / "huge.npz"
    import io
    import zipfile

    with zipfile.ZipFile(path, "w") as file:
        for name, array in arrays.items():
            header = io.BytesIO()
            given = {"descr": array.dtype.str, "fortran_order": False, "shape": shape if name == key else array.shape}
            np.lib.format.write_array_header_1_0(header, given)
            file.writestr(f"{name}.npy", header.getvalue() + array.tobytes())
    with pytest.raises(BadInput, match=f"{key} declares the shape"):
        load_dataset(str(path))
