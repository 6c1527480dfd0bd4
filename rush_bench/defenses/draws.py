"""Whether a network draws at random, however seldom: where it draws from, and whether its logits depend on what it draws."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rush_bench.defenses.owner import generator_states, own_generators
from rush_bench.errors import BadInput

if TYPE_CHECKING:
    from rush_bench.defenses.body import Body

SEEDS, MORE = 32, 200  # calls with all rows, and with one row: what happens in 2 of 100 calls shows in 99 of 100 such searches
RARE = 1e-6  # how far from the ends of its range a number is put that is as low or as high as can be
FAR = 4.0  # standard deviations, likewise
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
Ask = Callable[[Tensor], Tensor]
Differ = Callable[[Tensor, Tensor], bool]


@dataclass(frozen=True)
class Sources:
    """Where a call drew from: `torch`, its global generators, as they stood before the call; `elsewhere`, numpy's, Python's or
    a generator of the network's own; `outputs` (R, K) of that call."""

    outputs: Tensor
    torch: bool
    elsewhere: bool

    def __bool__(self) -> bool:
        return self.torch or self.elsewhere


class _Watch(TorchDispatchMode):
    """Notes whether a generator was handed to what draws."""

    own = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.own |= (kwargs or {}).get("generator") is not None
        return func(*args, **(kwargs or {}))


class _Extreme(TorchDispatchMode):
    """What is drawn from torch's global generators is as low as can be (`place` 0), as high (1), or in the middle (0.5)."""

    def __init__(self, place: float) -> None:
        super().__init__()
        self.place = min(max(place, RARE), 1 - RARE)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | (kwargs or {})
            if given.get("generator") is None:
                self._put(func.overloadpacket.__name__.rstrip("_").removesuffix("_like"), out, given)
        return out

    def _put(self, law: str, out: Any, given: dict[str, Any]) -> None:
        """Write over what was drawn; laws that are not known here stay as they were drawn."""
        place, far = self.place, 2 * FAR * (self.place - 0.5)
        if law in ("rand", "uniform"):
            low, high = given.get("from", 0.0), given.get("to", 1.0)
            out.fill_(low + (high - low) * place)
        elif law == "randn" or (law == "normal" and isinstance(given.get("mean", 0.0), float | int)):
            out.fill_(given.get("mean", 0.0) + far * given.get("std", 1.0))
        elif law in ("randint", "random") and ("high" in given or "to" in given):
            low, high = given.get("low", given.get("from")) or 0, given.get("high", given.get("to"))
            if high is not None:
                out.fill_(low + round((high - 1 - low) * place))
        elif law == "bernoulli":
            p = given.get("p", given["self"])
            p = p if isinstance(p, Tensor) else torch.full_like(out, p, dtype=torch.float32)
            out.copy_(torch.where((p > 0) & (p < 1), torch.full_like(out, place >= 0.5), out))
        elif law == "exponential":
            out.fill_(-np.log1p(-place) / given.get("lambd", 1.0))
        elif law == "native_dropout" and given.get("train") is not False and 0 < given["p"] < 1:
            kept = float(place >= 0.5)
            out[0].copy_(given["input"] * (kept / (1 - given["p"])))
            out[1].fill_(kept)


def sources(body: Body, batch: Tensor, ask: Ask) -> Sources:
    """What a call of the network on rows (R, C, H, W) draws from."""
    device, watch, states = body.device, _Watch(), _states(body)
    try:
        with watch:
            out = ask(batch)
    except BadInput:  # what torch cannot watch: asked as ever, it may run
        states, out = _states(body), ask(batch)
    now = _states(body)
    moved, elsewhere = now[:-2] != states[:-2], now[-2:] != states[-2:] or watch.own or _keeps_one(body)
    if moved:  # one that seeds the generator itself leaves it in the same state whatever it was before
        after = []
        for seed in (1, 2):
            with own_generators(device, seed):
                ask(batch[:1])
                after.append(generator_states(device))
        moved = after[0] != after[1]
    return Sources(out, moved, elsewhere)


def depends(body: Body, batch: Tensor, ask: Ask, found: Sources, differ: Differ) -> bool:
    """Whether the logits of a network that draws depend on what it draws, as far as some hundred calls can tell.

    Rare events are looked for where they lie: at the ends and in the middle of what torch's global generators give.
    """
    first = seeded(body, batch, 0, ask)
    for seed in range(1, SEEDS + 1):
        if differ(first, seeded(body, batch, seed, ask, others=True)):
            return True
    if found.torch:
        for place in (0.0, 1.0, 0.5):
            try:
                with _Extreme(place):
                    out = seeded(body, batch, 0, ask)
            except BadInput:
                continue
            if differ(first, out):
                return True
    row = batch[-1:]
    first = seeded(body, row, 0, ask)
    return any(differ(first, seeded(body, row, seed, ask, others=True)) for seed in range(1, MORE + 1))


def depends_elsewhere(body: Body, batch: Tensor, ask: Ask, differ: Differ) -> bool:
    """Whether the logits are others where the same seed decides torch's draws, but not those of another generator."""
    first = seeded(body, batch, 0, ask)
    with own_generators(body.device, 0):
        return any(differ(first, _reseeded(body, batch, 0, ask, seed)) for seed in range(1, SEEDS + 1))


def remembers(body: Body, batch: Tensor, asking: Callable[[Body], Ask]) -> bool:
    """Whether a network that answers otherwise at each call does so alike in two copies: it remembers, and draws nothing."""
    try:
        twins = [copy.copy(body) for _ in range(2)]
        for twin in twins:
            twin.network = copy.deepcopy(body.network)
        first, second = ([seeded(twin, batch, 0, asking(twin)) for _ in range(2)] for twin in twins)
    except Exception:  # it cannot be copied
        return False
    return all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(first, second, strict=True))


def seeded(body: Body, batch: Tensor, seed: int, ask: Ask, *, others: bool = False) -> Tensor:
    """What the network returns for rows (R, C, H, W), in float32, its draws decided by `seed`; `others`: numpy's and Python's
    generators are seeded too, and keep what they got."""
    return _reseeded(body, batch, seed, ask, seed if others else None)


def _reseeded(body: Body, batch: Tensor, seed: int, ask: Ask, other: int | None) -> Tensor:
    if other is not None:
        np.random.seed(other)
        random.seed(other)
    with own_generators(body.device, seed):
        return ask(batch)


def _states(body: Body) -> list[Any]:
    """The states of all global generators: torch's, then numpy's and Python's."""
    return [*generator_states(body.device), pickle.dumps(np.random.get_state()), random.getstate()]


def _keeps_one(body: Body) -> bool:
    """Whether a module of the network has a generator for an attribute."""
    return any(isinstance(value, GENERATORS) for part in body.network.modules() for value in vars(part).values())
