"""Images that are no squares are trained on, attacked, certified and tabulated as they are."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from rush_bench import load_dataset, load_defense
from rush_bench.cli import main
from rush_bench.errors import BadInput
from rush_bench.networks import resolve
from rush_bench.networks.specs import image_shape

SMALL = ("network.name=resnet", "network.blocks=1", "network.width=8", "train.epochs=12", "train.lr=0.3")


def wide(path):
    """A bright stripe at one of four heights, which no mirror image changes."""
    arrays = {"classes": np.array(["one", "two", "three", "four"])}
    for split, count in (("train", 160), ("test", 40)):
        labels = np.arange(count) % 4
        pixels = np.random.default_rng(count).integers(0, 60, (count, 8, 16), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label : 2 * label + 2] += 150
        arrays |= {f"{split}_images": pixels, f"{split}_labels": labels}
    np.savez(path, **arrays)
    return str(path)


def test_wide_images_are_taken_as_they_are(tmp_path):
    data, place = wide(tmp_path / "wide.npz"), ["--store", str(tmp_path / "models")]

    def run(*words):
        done = CliRunner().invoke(main, list(words))
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    sets = [word for setting in SMALL for word in ("--set", setting)]
    done = CliRunner().invoke(main, ["train", "noise_sup", "--dataset", data, "--preset", "smoke", *place, *sets])
    assert done.exit_code == 0, done.output
    card = json.loads((tmp_path / "models/noise_sup-wide/card.json").read_text())
    assert card["network"]["size"] == [8, 16]
    defense = load_defense("noise_sup-wide@4", store=tmp_path / "models")
    assert defense.shape == (1, 8, 16)
    out = ["--out", str(tmp_path / "results"), "--json", *place]
    few = [word for what in ("pgd.steps", "eot.steps", "apgd.steps", "square.queries") for word in ("--set", f"{what}=2")]
    (row,) = run("attack", "--models", "noise_sup@4", "--dataset", data, "--suite", "linf2-quick", *few, *out)["table"]
    assert row["clean"] > 60
    done = CliRunner().invoke(main, ["certify", "noise_sup", "--dataset", data, "--draws", "200", "--n0", "10", *out])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("size", "shape", "kept"), [(16, (3, 16, 16), 16), ([16, 16], (3, 16, 16), 16), ((16, 32), (3, 16, 32), [16, 32])]
)
def test_the_size_of_a_network_is_a_side_or_two(size, shape, kept):
    spec = resolve({"name": "tiny", "size": size})
    assert image_shape(spec) == shape and spec["size"] == kept == json.loads(json.dumps(spec))["size"]


@pytest.mark.parametrize("size", [0, -1, [16], [16, 0], [16, 16, 16], "16", 1.5])
def test_other_sizes_are_refused(size):
    with pytest.raises(BadInput, match="size"):
        resolve({"name": "tiny", "size": size})
    if isinstance(size, int | list):
        with pytest.raises(BadInput, match="size"):
            load_dataset("digits", size=size)


def test_a_data_set_comes_in_any_two_sides(tmp_path):
    assert load_dataset("digits", n=10, size=(12, 20)).shape == (1, 12, 20)
    images = load_dataset(wide(tmp_path / "wide.npz"))
    assert images.shape == (1, 8, 16) and images.size == (8, 16)
    assert load_dataset("digits", n=10).size == 16
