"""A run is known by what is in the files that it read: the same path with other content is another run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rush_bench import registry
from rush_bench.errors import BadInput, WorkLeft
from rush_bench.files import sha256_file
from rush_bench.settings import override
from rush_bench.store import read_card
from rush_bench.training import train
from rush_bench.training.options import file_digests

TINY = ("network.name=resnet", "network.blocks=1", "network.width=4", "n_train=64", "attack.steps=1")
DIGITS = 1_297  # images of the official training split


def generated(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 16, 16, 1), dtype=np.uint8)
    np.savez(path, image=pixels, label=np.arange(40) % 10)


def pseudo(path: Path, seed: int) -> None:
    np.savez(path, pseudo_train_2=np.random.default_rng(seed).integers(0, 2, DIGITS))


def own_images(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 16, 16, 1), dtype=np.uint8)
    labels = np.arange(90) % 3
    np.savez(path, train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels, classes=["a", "b", "c"])


FILES = {  # what writes it, the recipe, the settings that name it, the key that must differ
    "generated": (generated, "dataaug", "train.generated={}", "data.files.train.generated"),
    "pseudo": (pseudo, "advcl", "pseudo_file={}", "data.files.pseudo_file"),
    "dataset": (own_images, "pgd_at", None, "data.digest.train"),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_other_content_at_the_same_path_is_another_run(kind: str, finished: bool, tmp_path: Path) -> None:
    write, recipe, setting, differs = FILES[kind]
    path = tmp_path / "made.npz"
    write(path, 0)
    sets = [*TINY, *([setting.format(path)] if setting else [])]
    if kind == "pseudo":
        sets += ["pseudo_source=file", "pretrain.clusters=2"]

    def call(minutes: float | None) -> Path:
        images = "digits" if setting else str(path)
        return train(recipe, dataset=images, preset="smoke", sets=sets, store=tmp_path, name="run", max_minutes=minutes)

    if finished:
        call(None)
        digests = read_card(tmp_path, "run")["data"].get("files", {})
        assert list(digests.values()) == ([sha256_file(path)] if setting else [])
    else:
        with pytest.raises(WorkLeft):
            call(0)
    write(path, 1)
    with pytest.raises(BadInput, match=f"run with other settings: .*{differs} is "):
        call(None)
    write(path, 0)
    call(None)  # goes on, or finds nothing to do


def test_every_setting_that_names_a_file_says_so() -> None:
    """Text settings by the name of a file or path, in any recipe, are among the digested ones."""

    def texts(settings, prefix: str = ""):
        for one in dataclasses.fields(settings):
            value = getattr(settings, one.name)
            if dataclasses.is_dataclass(value):
                yield from texts(value, f"{prefix}{one.name}.")
            elif value == "":
                yield prefix + one.name, bool(one.metadata.get("file"))

    found = {}
    for name in registry.recipes.entries:
        found |= {f"{name} {key}": file for key, file in texts(registry.recipes.load(name).settings)}
    assert all(found.values()), found
    assert {"dataaug train.generated", "advcl pseudo_file"} <= set(found)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    settings = registry.recipes.load("dataaug").settings
    assert file_digests(settings) == {}
    with pytest.raises(BadInput, match=r"setting train\.generated, .*none\.npz, cannot be read \(No such file"):
        file_digests(override(settings, {"train.generated": str(tmp_path / "none.npz")}))
