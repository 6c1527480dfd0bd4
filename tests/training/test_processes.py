"""Two and three processes train to the weights of one, and go on where others stopped.

In float64: rounding is all that may differ, and in float32 it soon decides what a ReLU or the sign of an attack's gradient
makes of a 0, as it does between two kernels of one convolution.
"""

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rush_bench.datasets import Images
from rush_bench.errors import BadInput, WorkLeft
from rush_bench.files import read_json
from rush_bench.store import read_weights
from rush_bench.training import encoders, train

SMALL = ("network.name=resnet", "network.blocks=1", "network.width=4", "n_train=32")
PRETRAINED = (*SMALL, "pretrain.epochs=1", "pretrain.batch_size=16", "finetune.epochs=1", "finetune.batch_size=32")
ATTACKED = (*PRETRAINED, "attack.steps=2", "finetune.select_images=0")
RUNS = {
    "rush": (*PRETRAINED, "finetune.bn_adapt=beta_stats"),
    "simclr": (*PRETRAINED, "pretrain.projector_norm=true"),
    "acl": (*ATTACKED, "finetune.protocol=SLF"),
    "pgd_at": (*SMALL, "train.epochs=1", "train.batch_size=16", "attack.steps=2", "train.select_images=16"),
    "dynacl": ATTACKED,
}
HALF, COMPILED, APART = "half", "compile", "different"  # stores: what three processes begin and two end; what is refused
STOPPED = {HALF: WorkLeft, COMPILED: BadInput, APART: BadInput}
Job = tuple[str, str, type[Exception] | None]  # recipe, store, and how it ends


def call(name: str, store: Path, sets: Sequence[str] = (), **options: Any) -> Path:
    return train(name, dataset="digits", preset="smoke", sets=(*RUNS[name], *sets), store=store, device="cpu", **options)


def member(rank: int, count: int, jobs: list[tuple[int, Job]], folder: Path) -> None:
    """One process of `count`: each job is what torchrun would start it with, at a port of its own."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    floats, torch.Tensor.float = Images.floats, torch.Tensor.double
    Images.floats = lambda *of: floats(*of).double()
    encoders.code_digest = lambda module: "any"  # half a second
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    for port, (name, store, ends) in jobs:
        os.environ["MASTER_PORT"] = str(port)
        options = {WorkLeft: {"max_minutes": 0}}.get(ends, {})
        options |= {COMPILED: {"sets": ["compile=true"]}, APART: {"seed": rank}}.get(store, {})
        with pytest.raises(ends, match=store if ends is BadInput else None) if ends else contextlib.nullcontext():
            call(name, folder / store, **options)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def together(count: int, jobs: list[Job], folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["rush_bench.training.run", "rush_bench.recipes.dynacl", "sklearn.datasets", "torch._dynamo"]
    )
    at = list(zip(free_ports(len(jobs)), jobs, strict=True))
    members = [context.Process(target=member, args=(rank, count, at, folder)) for rank in range(count)]
    for each in members:
        each.start()
    for each in members:
        each.join(300)
    assert [each.exitcode for each in members] == [0] * count


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Stores `1`, `2`, `3` of that many processes, and `half`."""
    folder = tmp_path_factory.mktemp("processes")
    together(1, [(name, "1", None) for name in RUNS], folder)
    together(3, [("acl", "3", None), *(("simclr", store, ends) for store, ends in STOPPED.items())], folder)
    assert (folder / HALF / "simclr-digits" / ".training" / "checkpoint.pt").exists()
    together(2, [*((name, "2", None) for name in RUNS), ("simclr", HALF, None)], folder)
    return folder


@pytest.mark.parametrize(("name", "store"), [*((name, "2") for name in RUNS), ("acl", "3"), ("simclr", HALF)])
def test_many_processes_equal_one(name, store, trained):
    homes = [trained / "1", trained / store]
    one, many = (read_weights(home, f"{name}-digits") for home in homes)
    assert one.keys() == many.keys()
    for key, value in one.items():
        assert torch.allclose(many[key].double(), value.double(), rtol=1e-8, atol=1e-10), key
    curves = [read_json(home / f"{name}-digits" / "card.json")["validation"]["history"] for home in homes]
    assert [entry["loss"] for entry in curves[1]] == pytest.approx([entry["loss"] for entry in curves[0]], rel=1e-7)
