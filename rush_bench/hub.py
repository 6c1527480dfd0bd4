"""Models and packs on the Hugging Face hub: `hf://user/name` is a model, `hf://datasets/user/name` a pack.

A model's repository has what the store has, safetensors and the card, and the card in words as its README. What is pulled
is checked against the SHA-256 of its card before it enters the store; nothing that could run code is read, nor torch imported.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rush_bench.errors import BadInput, MissingPackage, RushBenchError
from rush_bench.files import sha256_file, write_text
from rush_bench.packs import opened
from rush_bench.protocols import in_words
from rush_bench.store import check_name, read_card, write_card

CARD, LOG, README = "card.json", "log.jsonl", "README.md"
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Place:
    """A repository of the hub: `user/name`, of kind `model` or `dataset`."""

    repository: str
    kind: str

    @property
    def name(self) -> str:
        return self.repository.partition("/")[2]


def place_of(url: str) -> Place:
    """`hf://user/name` or `hf://datasets/user/name`; BadInput for another form."""
    found = re.fullmatch(r"hf://(datasets/)?([\w.-]+/[\w.-]+)", url)
    if not found:
        raise BadInput(f"{url!r} is to be hf://user/name for a model, hf://datasets/user/name for a pack")
    return Place(found[2], "dataset" if found[1] else "model")


def push(what: str, url: str, *, store: Path) -> str:
    """Upload a model of the store by its name, or a pack by its file; returns its address.

    Errors: BadInput for a name or file that is none, or weights that are not those of the card; MissingPackage; RushBenchError
    where the hub refuses.
    """
    place = place_of(url)
    with tempfile.TemporaryDirectory(prefix="rush-bench-") as temporary:
        folder = Path(temporary)
        if place.kind == "dataset":
            pack = Path(what)
            opened(pack)  # a pack, and whole
            if not pack.is_file():
                raise BadInput(f"{what} is no pack; make one with rush-bench pack")
            shutil.copy(pack, folder / f"{place.name}.zip")
            write_text(folder / README, pack_readme(pack))
        else:
            card = checked(store, what)
            for name in [CARD, *(f"{stem}.safetensors" for stem in card["sha256"]), LOG]:
                if (store / what / name).exists():
                    shutil.copy(store / what / name, folder / name)
            write_text(folder / README, model_readme(what, card))
        with reaching() as hub:
            api = hub.HfApi()
            api.create_repo(place.repository, repo_type=place.kind, exist_ok=True)
            api.upload_folder(
                repo_id=place.repository, repo_type=place.kind, folder_path=folder, commit_message=f"{what}, rush-bench"
            )
    return url


def pull(url: str, *, store: Path, name: str | None = None, out: Path | None = None) -> Path:
    """Download a model into the store, as `name` (that of its card), or a pack to `out` (`<name>.zip`); returns its path.

    Errors: as `push`; BadInput where the store has another model of that name.
    """
    place = place_of(url)
    with tempfile.TemporaryDirectory(prefix="rush-bench-") as temporary:
        folder = Path(temporary) / "model"
        wanted = [f"{place.name}.zip"] if place.kind == "dataset" else [CARD, LOG, WEIGHTS]
        with reaching() as hub:
            hub.snapshot_download(place.repository, repo_type=place.kind, local_dir=folder, allow_patterns=wanted)
        if place.kind == "dataset":
            if not (folder / wanted[0]).is_file():
                raise BadInput(f"{url} has no {wanted[0]}; it is no pack of rush-bench")
            opened(folder / wanted[0])
            path = Path(out) if out is not None else Path(wanted[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / wanted[0], path)
            return path
        card = checked(folder.parent, folder.name)
        path = store / check_name(name or str(card.get("name")))
        if (path / CARD).exists() and read_card(store, path.name)["sha256"] != card["sha256"]:
            raise BadInput(f"{path} is another model; give this one another --name")
        path.mkdir(parents=True, exist_ok=True)
        kept = [LOG, *(f"{stem}.safetensors" for stem in card["sha256"])]
        for file in (folder / each for each in kept if (folder / each).exists()):
            shutil.copy(file, path / file.name)
        write_card(path, card | {"name": path.name})
    return path


def checked(store: Path, name: str) -> dict[str, Any]:
    """The card of a model; BadInput where its weights are not all there, or others."""
    card = read_card(store, name)
    for stem, sha in card["sha256"].items():
        path = store / name / f"{stem}.safetensors"
        if stem not in ("model", "best", "transform") or not path.is_file() or sha256_file(path) != sha:
            raise BadInput(f"the weights {stem!r} of {name} are missing or not those of its card; train or copy it again")
    return card


@contextlib.contextmanager
def reaching() -> Iterator[ModuleType]:
    """huggingface_hub; MissingPackage without it. Its errors become RushBenchErrors with its message."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackage("hf:// needs huggingface_hub: pip install 'rush-bench[hub]'") from error
    try:
        yield huggingface_hub
    except Exception as error:  # its own errors, and those of whichever HTTP library it stands on
        raise RushBenchError(
            f"the hub did not do it ({type(error).__name__}: {error}); is there a network, and `hf auth login` done?"
        ) from error


def model_readme(name: str, card: Mapping[str, Any]) -> str:
    """The card in words, under the head that the hub reads. Accuracies are those of training; tables are another matter."""
    about = {
        "recipe": card["recipe"],
        "trained for": card["dataset"],
        "pre-trained on": card.get("pretrain_dataset"),
        "protocol": in_words(card["protocol"]) if card.get("protocol") else None,
        "extra data": card.get("extra_data"),
        "network": ", ".join(f"{key} {value}" for key, value in card["network"].items() if key in ("name", "width", "size")),
        "noise": json.dumps(card["noise"]) if card.get("noise") else None,
        "votes": ", ".join(map(str, card["votes"])),
        "preset": card.get("preset"),
        "seed": card.get("seed"),
    }
    lines = [f"| {key} | {value} |" for key, value in about.items() if value not in (None, "")]
    epochs = (card.get("validation") or {}).get("history") or [{}]
    measured = [f"{key} {100 * value:.1f} %" for key, value in epochs[-1].items() if key in ("clean", "noisy", "robust")]
    accuracy = f"On held-out images after the last epoch: {', '.join(measured)}. " if measured else ""
    return "\n".join(
        [
            *("---", "library_name: rush-bench", "tags:", "- adversarial-robustness", "- rush-bench", "---", ""),
            *(f"# {name}", "", "| | |", "|---|---|", *lines, ""),
            f"{accuracy}That is no measure of robustness: attack it.",
            "",
            "    rush-bench pull hf://USER/NAME",
            f"    rush-bench attack --models {name} --suite linf8",
            "",
        ]
    )


def pack_readme(pack: Path) -> str:
    """What a pack is, and its tables as they were written."""
    folder = opened(pack).folder
    tables = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("table.md"))]
    head = ["---", "tags:", "- adversarial-robustness", "- rush-bench", "---", "", f"# {pack.stem}", ""]
    usage = ["Records of rush-bench, every number with its interval and where it is from.", ""]
    usage += ["    rush-bench pull hf://datasets/USER/NAME", f"    rush-bench report {pack.name}", ""]
    return "\n".join([*head, *usage, *tables])
