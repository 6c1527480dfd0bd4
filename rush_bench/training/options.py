"""Settings that every recipe shares. A recipe's own settings extend these; defaults that name no source are ours."""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rush_bench.errors import BadInput
from rush_bench.files import sha256_file
from rush_bench.settings import Count, NonNegative, Positive, PositiveShare, Range, Settings, Whole


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """Which network; empty values leave the choice to the name (see `rush_bench.networks`)."""

    name: str = "resnet18"  # RUSH 5.1; with the CIFAR stem (sources S5.30)
    blocks: tuple[Count, ...] = ()
    width: Whole = 0
    members: Whole = 0  # networks in an ensemble; 0 is one
    stem: Literal["cifar", "cifar-linear", "imagenet"] = "cifar"
    mean: tuple[float, ...] = ()  # no normalisation (sources S5.15)
    std: tuple[Positive, ...] = ()
    padding: Whole = 0  # of the CIFAR stem's convolution; 0: the usual 1


@dataclass(frozen=True)
class Optimisation(Settings):
    """How one stage steps: optimiser, learning rate over the stage, epochs."""

    epochs: Count = 1
    batch_size: Count = 512
    optimiser: Literal["sgd", "lars", "adam"] = "sgd"
    lr: Positive = 0.1
    schedule: Literal["cosine", "steps"] = "cosine"
    lr_min: NonNegative = 0.0  # the cosine's end, absolute
    milestones: tuple[NonNegative, ...] = ()  # epochs done, parts of one too; of schedule=steps
    decay: PositiveShare = 0.1
    warmup_epochs: NonNegative = 0
    warmup_from: NonNegative = 0.0  # where the linear warm-up starts
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9  # adam's beta_1
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    lars_exclude_1d: bool = True  # False for the ACL family (sources S1.4)


@dataclass(frozen=True)
class RunSettings(Settings):
    """What holds for all stages of a run."""

    network: NetworkSettings = field(default_factory=NetworkSettings)
    noise: str = "none"  # the smoothing operation Q: uniform:0.3, gaussian:0.25, laplace:0.1, none
    size: Count | tuple[Count, ...] | None = None  # pixels a side, or height and width; None: the data set's own default
    n_train: Count | None = None  # a fixed subset of the training images; None: all
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True  # a quarter to a third off a CPU step of the demo's network
    compile: bool = False


def file_setting() -> Any:
    """A setting, empty by default, that names a file: what is in the file then decides which run it is, as data do."""
    return field(default="", metadata={"file": True})


def file_digests(settings: Any, prefix: str = "") -> dict[str, str]:
    """Hex SHA-256 of every file that the settings name, by dotted key. BadInput where there is no such file."""
    digests: dict[str, str] = {}
    for setting in fields(settings):
        value, key = getattr(settings, setting.name), prefix + setting.name
        if is_dataclass(value):
            digests |= file_digests(value, f"{key}.")
        elif value and setting.metadata.get("file"):
            try:
                digests[key] = sha256_file(Path(value).expanduser())
            except OSError as error:
                raise BadInput(
                    f"the file of the setting {key}, {value}, cannot be read ({error.strerror}); --set {key}=PATH"
                ) from error
    return digests
