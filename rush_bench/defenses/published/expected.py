"""Sources S4.2: an imported network's clean accuracy on 500 fixed test images, beside the published number where one is known.

Wrong constants or the wrong BatchNorm route load without any complaint and show here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from rush_bench.datasets import Images, load_dataset
from rush_bench.defenses.smoothed import Deterministic, Smoothed
from rush_bench.errors import BadInput
from rush_bench.features import knn_accuracy, outputs
from rush_bench.networks import Classifier
from rush_bench.noise import Noise, Stream
from rush_bench.places import data_folder, on_disk
from rush_bench.settings import parse_number

IMAGES = 500
VOTES = 16  # of a smoothed model: the published numbers take many more, which moves them by about a point
LEVEL = 1e-3  # a right network is refused once in a thousand imports
BANK = 1000  # training images that vote on an encoder's features
BATCH = 100


@dataclass(frozen=True)
class Expected:
    """A published clean accuracy: of the file of this name or SHA-256, if its family and data set are these."""

    file: str
    family: str
    dataset: str
    clean: float
    source: str
    sha256: str = ""


def _rebuffi(file: str, dataset: str, clean: float) -> Expected:
    return Expected(file, "network of Rebuffi 2021 (deepmind-research)", dataset, clean, "deepmind-research's README")


# By the authors' file names; they give no digests (TRADES' is unverified: a user of the file states it in a README).
TRADES_SHA256 = "2ede52bd042bbdf40a0c27e8008034afd9cbb0b256b9077a255e555d25f957f4"
MANIFEST = (
    Expected("model_cifar_wrn.pt", "WideResNet (TRADES)", "cifar10", 0.8492, "RobustBench", TRADES_SHA256),
    Expected("cifar_linf_8.pt", "ResNet of MadryLab's robustness", "cifar10", 0.8703, "RobustBench"),
    _rebuffi("cifar10_linf_wrn28-10_cutmix_ddpm_v2.pt", "cifar10", 0.8733),
    _rebuffi("cifar10_linf_wrn70-16_cutmix_ddpm_v2.pt", "cifar10", 0.8854),
    _rebuffi("cifar10_linf_wrn106-16_cutmix_ddpm_v2.pt", "cifar10", 0.8850),
    _rebuffi("cifar100_linf_wrn28-10_cutmix_ddpm.pt", "cifar100", 0.6241),
    _rebuffi("cifar100_linf_wrn70-16_cutmix_ddpm.pt", "cifar100", 0.6356),
    _rebuffi("cifar10_linf_wrn70-16_with.pt", "cifar10", 0.9110),
    _rebuffi("cifar10_linf_wrn28-10_with.pt", "cifar10", 0.8948),
    _rebuffi("cifar10_linf_wrn70-16_without.pt", "cifar10", 0.8529),
    _rebuffi("cifar10_linf_wrn34-20_without.pt", "cifar10", 0.8564),
)


def expectation(
    file: str, sha256: str, family: str, dataset: str, noise: Noise | None, wanted: float | str | None
) -> Expected | None:
    """What clean accuracy is expected: the user's number, else the manifest's; None for `none` and where none is known."""
    if wanted is None:
        same = (entry for entry in MANIFEST if (entry.family, entry.dataset) == (family, dataset))
        known = (entry for entry in same if file == entry.file or sha256 == entry.sha256)
        return None if noise is not None else next(known, None)
    if wanted == "none":
        return None
    clean = parse_number(wanted) if isinstance(wanted, str) else wanted
    if not 0 < clean <= 1:
        raise BadInput(f"--expect-clean {wanted} must be a part of 1, such as 0.84, or none")
    return Expected(file, family, dataset, float(clean), "the user's")


def measure_clean(
    network: Classifier,
    expected: Expected | None,
    *,
    dataset: str,
    noise: Noise | None = None,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> str:
    """A note on what was measured; BadInput where it does not agree with what is expected, by a two-sided binomial test.

    Where the data set is not on this machine nothing is measured (nor downloaded), and the note says that.
    """
    wanted = "nothing is published for this file" if expected is None else f"expected {expected.clean:.1%} ({expected.source})"
    if not on_disk(dataset, data_folder(data_dir)):
        return f"clean accuracy was not measured ({wanted}): {dataset} is not on this machine"
    images = some(dataset, "test", IMAGES, network, data_dir)
    right, count = count_right(network, images, noise, device), len(images)
    found = f"clean accuracy on {count} test images is {right / count:.1%}, {wanted}"
    if expected is None:
        return f"{found}; a wrong normalisation would show here"
    if stats.binomtest(right, count, expected.clean).pvalue >= LEVEL:
        return found
    raise BadInput(
        f"{found}, too far off for chance; nothing was imported. Likely causes: normalisation (--normalise), the BatchNorm "
        "route (--bn-route), another data set, head or noise than the file's. --expect-clean none imports it all the same"
    )


def measure_encoder(
    network: Classifier, *, dataset: str, data_dir: str | Path | None = None, device: torch.device | str = "cpu"
) -> str:
    """A note on an encoder: without a head there is no accuracy, but its nearest neighbours show a wrong normalisation too."""
    if not on_disk(dataset, data_folder(data_dir)):
        return f"an encoder has no head, hence no accuracy; nor were its neighbours looked at: {dataset} is not on this machine"
    encoder = network.encoder.to(device).eval()
    parts = [some(dataset, split, count, network, data_dir).to(device) for split, count in (("train", BANK), ("test", IMAGES))]
    bank, queries = (outputs(encoder, images) for images in parts)
    found = knn_accuracy(bank, parts[0].labels, queries, parts[1].labels)
    return (
        f"an encoder has no head, hence no accuracy; by its nearest neighbours among {len(bank)} training images "
        f"{found:.1%} of {len(queries)} test images are right (a wrong normalisation lowers it)"
    )


def some(dataset: str, split: str, count: int, network: Classifier, data_dir: str | Path | None) -> Images:
    """At most so many images of a split, of the size that the network takes."""
    images = load_dataset(dataset, split, data_dir=data_dir, size=network.spec["size"])
    return load_dataset(dataset, split, count, data_dir=data_dir, size=network.spec["size"]) if len(images) > count else images


def count_right(network: Classifier, images: Images, noise: Noise | None, device: torch.device | str) -> int:
    """How many images a network classifies right, in its present train or eval mode; under noise by a vote."""
    copy = network.single_route(0).eval()  # a defence freezes and moves what it is given
    options: dict[str, Any] = {"shape": images.shape, "device": device}
    defense = Smoothed(copy, noise=noise, votes=VOTES, **options) if noise else Deterministic(copy, **options)
    right = 0
    for start in range(0, len(images), BATCH):
        positions = torch.arange(start, min(start + BATCH, len(images)))
        answers = defense.predict(images.floats(positions), Stream(0, "import", positions)).labels
        right += int((answers.cpu() == images.labels[positions]).sum())
    return right
