"""Checkpoints of a run that is not finished, in `<model folder>/.training/`, and what a run is identified by."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rush_bench.errors import BadInput, Busy
from rush_bench.files import flock, write_atomic

FORMAT = 1
IDENTITY = ("recipe", "dataset", "pretrain_dataset", "seed", "settings", "data")  # keys of a card; equal means same run


def identity(card: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a card that decides the weights, as it reads back from JSON; None for what an import does not say."""
    return json.loads(json.dumps({key: card.get(key) for key in IDENTITY}))


def refuse_different_run(
    found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path, defaults: Mapping[str, Any] | None = None
) -> None:
    """BadInput that names what differs, if the folder belongs to another run.

    usual: the settings where nobody asks for others. A setting that is younger than the run there is no difference while it
    has its usual value, which is what ran before there was such a setting.
    """
    stored, current, default = _flat(found), _flat(wanted), _flat(json.loads(json.dumps({"settings": defaults or {}})))
    newer = {key for key in current.keys() - stored.keys() if key in default and current[key] == default[key]}
    differing = [key for key in sorted((stored.keys() | current.keys()) - newer) if stored.get(key) != current.get(key)]
    if differing:
        shown = [f"{key} is {stored.get(key)!r} there and {current.get(key)!r} here" for key in differing[:6]]
        rest = f", and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise BadInput(
            f"{folder} holds a run with other settings: {'; '.join(shown)}{rest}. "
            "Give this one another --name, or delete the folder"
        )


class CheckpointFile:
    """The one checkpoint of a run. Writes replace it atomically; reads check format, content and identity."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.model_folder, self.folder = folder, folder / ".training"
        self.path = self.folder / "checkpoint.pt"
        self.run = dict(run)

    def save(self, content: Mapping[str, Any]) -> None:
        """Tensors and plain values only, so that `weights_only=True` reads them."""
        whole = {"format": FORMAT, "run": json.dumps(self.run), **content}
        # on a full disk torch's writer raises a RuntimeError, and a second one where it closes the file
        write_atomic(self.path, lambda temporary: torch.save(whole, temporary), fails=RuntimeError)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The content, or None where there is none."""
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location=device, weights_only=True)
            found, readable = json.loads(content["run"]), content["format"] == FORMAT
        except Exception as error:  # on damaged bytes torch's reader raises whatever it stumbles over
            raise BadInput(
                f"checkpoint {self.path} is damaged ({type(error).__name__}); delete {self.folder} to train from the start"
            ) from error
        if not readable:
            raise BadInput(f"checkpoint {self.path} is of another version; delete {self.folder} to train from the start")
        refuse_different_run(found, self.run, self.model_folder)
        return content

    def remove(self) -> None:
        """Delete the folder of the unfinished run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process per model, where the file system has locks. The system frees it when its holder dies."""
        try:
            with flock(self.folder / "lock", wait=False) as held:
                if held is False:
                    raise Busy(
                        f"another process is training in {self.model_folder}; wait for it, or give this run another --name"
                    )
                yield
        finally:
            for folder in (self.folder, self.model_folder):  # nothing was kept: nothing stays
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = key if prefix == "settings." else prefix + key
        flat |= _flat(item, name + ".") if isinstance(item, Mapping) else {name.removeprefix("settings."): item}
    return flat
