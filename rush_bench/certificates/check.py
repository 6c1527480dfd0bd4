"""Certificate above attack: a check that must never fire, since a certificate is a theorem and an attack a measurement.

And a certificate's record against itself, before any of its numbers is used.

A certificate is about infinitely many votes, an attack was scored on predictions of m votes, so they are compared through
what the theorem leaves: an image whose class has a probability of at least `bound` keeps at least `moved(bound, eps)` at
every x' within eps; where that is p, a prediction of m votes is right at least as often as Binomial(m, p) has a strict
majority. This floor is 0 for images that are not certified at eps. Attacks that fall below the sum of the floors by more
than chance allows show a bug in one of the two.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from rush_bench.certificates.bounds import Certificate, certificate, lower_bound
from rush_bench.errors import BadInput
from rush_bench.noise import noise_from
from rush_bench.records import TOLERANCE, CellResult, load_results
from rush_bench.registry import datasets

FOLDER = "certificates"  # of a results folder
CLOSE = 1e-6  # what other versions of scipy may change, relative


@dataclass(frozen=True)
class Comparison:
    """One certificate beside one attack, on the images that both have. Accuracies are fractions.

    `certified` at the attack's eps; `floor` the least accuracy that certificates allow a prediction of `votes` votes;
    `attacked` what was measured; `allowed` how far below the floor chance may take it. `same_images`: known to be the same,
    not only of one name and position. `contradiction`: further below the floor than chance, on the same images.
    """

    defense: str
    attack: str
    norm: str
    eps: float
    votes: int
    n: int
    certified: float
    floor: float
    attacked: float
    allowed: float
    same_images: bool = True

    @property
    def contradiction(self) -> bool:
        """Whether certificate and attack cannot both be right."""
        return self.same_images and self.attacked < self.floor - self.allowed

    def __str__(self) -> str:
        return (
            f"{self.defense}, {self.attack} at {self.norm} {self.eps:.4g}: {self.attacked:.2%} right on {self.n} images where "
            f"certificates leave at least {self.floor:.2%} (chance explains {self.allowed:.2%} less)"
        )


def comparisons(certificates: Iterable[CellResult], attacks: Iterable[CellResult], error: float = 1e-3) -> list[Comparison]:
    """Every certificate beside every attack on the same weights, noise and data set; `error`: chance of a false alarm each.

    Records of other defences, of banks and of deterministic classifiers are passed over; so are incomplete ones.
    """
    attacks = [a for a in attacks if a.complete and a.identity["attack"]["name"] != "certify"]
    found = []
    for own in certificates:
        if not own.complete:
            continue
        for other in attacks:
            if _same_defense(own, other) and (compared := _compare(own, other, error)):
                found.append(compared)
    return found


def contradictions(certificates: Iterable[CellResult], attacks: Iterable[CellResult], error: float = 1e-3) -> list[Comparison]:
    """The comparisons that cannot be: certified accuracy above the attacked one by more than the stated error."""
    return [compared for compared in comparisons(certificates, attacks, error) if compared.contradiction]


def clashes(attacks: Iterable[CellResult], *folders: Path) -> list[Comparison]:
    """The contradictions between these attacks and the certificates under any of the results folders, each named once.

    BadInput for a certificate that does not follow from its draws.
    """
    attacks = list(attacks)
    unique = {result.folder: result for result in attacks if result.complete}
    found: dict[Path, CellResult] = {}
    for folder in folders:
        found |= {r.folder: r for r in load_results(Path(folder) / FOLDER, warn=lambda text: None)}
    for certified in found.values():
        if certified.complete:
            check_record(certified)
    return contradictions(found.values(), unique.values())


def theorem_of(result: CellResult) -> Certificate:
    """The theorem behind a certificate's record."""
    law = noise_from(result.identity["defense"]["noise"])
    assert law is not None
    return certificate(law, result.identity["threat"]["norm"], result.identity["attack"]["dimension"])


def check_record(result: CellResult) -> None:
    """BadInput unless a certificate follows from its draws: the radius is its bound's by the theorem, the class the selected
    one where the bound is at least 1/2 and else none, and in mode `fixed` the bound that of all draws.

    The bound of a mode that stops early is the best of several looks, whose counts no record has.
    """
    arrays, attack = result.arrays, result.identity["attack"]
    bound, selected, used = arrays["bound"], arrays["selected"].astype(int), arrays["repeats"]
    certified = bound >= 0.5
    radius = np.where(certified, theorem_of(result).radius(np.maximum(bound, 0.5)), 0.0)
    right = {
        "radius is not that of its bound": np.isclose(arrays["radius"], radius, rtol=CLOSE, atol=1e-12),
        "class is not the selected one": arrays["predict"] == np.where(certified, selected, -1),
    }
    if attack["mode"] == "fixed":
        counted = lower_bound(arrays["counts"][np.arange(len(selected)), selected], used, attack["alpha"])
        whole = (used == attack["draws"]) & np.isclose(bound, counted, rtol=CLOSE, atol=1e-12)
        right["bound is not that of its draws"] = whole
    for what, each in right.items():
        if not each.all():
            image = int(arrays["index"][~each][0])
            raise BadInput(
                f"{result.folder}: the certificate of image {image} was changed, its {what}; "
                "delete the folder and run the same command again"
            )


def _same_defense(own: CellResult, other: CellResult) -> bool:
    theirs = {key: value for key, value in other.identity["defense"].items() if key != "votes"}
    data = all(own.labels.get(key) == other.labels.get(key) for key in ("dataset", "split"))
    return bool(data and theirs == own.identity["defense"] and other.identity["defense"].get("votes"))


def _same_images(own: CellResult, other: CellResult) -> bool:
    """Of a registered data set a position names an image for ever; of others the digests of all images tell."""
    images = own.identity["images"]
    return own.labels["dataset"] in datasets.entries or other.identity.get("images", images) == images


def _compare(own: CellResult, other: CellResult, error: float) -> Comparison | None:
    both = own.frame.merge(other.frame, on=["index", "label"], suffixes=("", "_attacked"))
    if both.empty:
        return None
    theorem, votes = theorem_of(own), int(other.identity["defense"]["votes"])
    threat = other.identity["threat"] or {"norm": theorem.norm, "eps": 0.0}
    eps = float(threat["eps"])
    reach = theorem.covering(threat["norm"], eps + TOLERANCE if eps else 0.0)
    certified = ((both["predict"] == both["label"]) & (both["radius"] >= reach)).to_numpy()
    p = theorem.moved(both["bound"].to_numpy(), reach)
    floors = np.where(certified, stats.binom.sf(votes // 2, votes, p), 0.0)
    repeats = both["repeats_attacked"].to_numpy()
    alpha = float(own.identity["attack"]["alpha"])
    return Comparison(
        str(other.labels["defense"]),
        str(other.labels["attack"]),
        str(threat["norm"]),
        eps,
        votes,
        len(both),
        float(certified.mean()),
        float(floors.mean()),
        float((both["correct_attacked"] / repeats).mean()),
        _allowed(floors, repeats, alpha, error),
        _same_images(own, other),
    )


def _allowed(floors: np.ndarray, repeats: np.ndarray, alpha: float, error: float) -> float:
    """How far the measured accuracy may fall below the mean floor, but for a chance of `error`.

    Half of it for false certificates, of which there are at most Binomial(n, alpha); half, by Bernstein's
    inequality, for the draws: the number right is at least as large as a sum of independent Bernoulli(floor) / repeats.
    """
    false = stats.binom.isf(error / 2, len(floors), alpha) if floors.any() else 0.0
    log = np.log(2 / error)
    variance = float((floors * (1 - floors) / repeats).sum())
    step = float(1 / repeats.min())
    spread = log * step / 3 + np.sqrt((log * step / 3) ** 2 + 2 * log * variance)
    return float((false + spread) / len(floors))
