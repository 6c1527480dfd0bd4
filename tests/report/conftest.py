"""Small finished evaluations on disk, with the numbers chosen by the test."""

from dataclasses import replace

import numpy as np
import pytest

from rush_bench.audits.evidence import Evidence, entries_of
from rush_bench.records import FORMAT, Cell, CellStore, load_results


class Lab:
    """Writes cells; `right` lists correct predictions out of `repeats`, an entry an image."""

    def __init__(self, folder):
        self.folder, self.store = folder, CellStore(folder)

    def cell(self, defense, attack, right, *, repeats=1, eps=8 / 255, norm="linf", suite="linf8", votes=0, bank=None, **k):
        chunks_done, of, settings = k.pop("chunks_done", None), k.pop("of", ()), k.pop("settings", {})
        weights, seed = k.pop("weights", defense.split("@")[0]), k.pop("seed", 0)
        right = np.asarray(right)
        identity = {
            "format": FORMAT,
            "weights": weights,
            "defense": {"votes": votes},
            "attack": {"name": attack, **settings, **({"of": [c.key for c in of]} if of else {})},
            "threat": None if attack == "clean" else {"norm": norm, "eps": eps},
            "images": f"digest of {len(right)}",
            "seed": seed,
            "repeats": repeats,
            "chunk": 10,
        }
        labels = {
            "defense": defense,
            "model": weights,
            "recipe": k.pop("recipe", defense.split("@")[0].split("-")[0]),
            "votes": votes,
            "dataset": "cifar10",
            "pretrain_dataset": None,
            "attack": attack,
            "suite": suite,
            "quick": suite.endswith("-quick"),
            "deterministic": votes == 0,
            "n": len(right),
            "norm": norm,
            "eps": eps,
            "classes": 4,
            "protocol": "NSLF",
            "extra_data": None,
            "architecture": "ResNet-18",
            "preset": "short",
            "budget": "1 + 1 epochs",
        } | k
        cell = Cell(identity, labels)
        self.store.open(cell)
        for chunk in range(cell.chunks if chunks_done is None else chunks_done):
            rows = np.array(cell.rows(chunk))
            correct, zeros = right[rows], np.zeros(len(rows))
            counts = np.zeros((len(rows), 4), int)
            counts[:, 0], counts[:, 1] = correct, repeats - correct
            arrays = {"index": rows, "label": zeros.astype(int), "correct": correct, "repeats": zeros.astype(int) + repeats}
            arrays |= dict.fromkeys(("margin", "distance", "forwards", "backwards", "seconds"), zeros)
            if bank is not None:
                arrays |= {"bank_correct": np.asarray(bank)[rows], "bank_repeats": zeros.astype(int) + 1}
            self.store.write(cell, chunk, arrays | {"counts": counts})
        return cell

    def results(self):
        return load_results(self.folder)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory):
    """A lab of a module's, for what takes long to make once."""
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def evidence(lab, does):
    """Makes the Evidence of `settle`: a trial is (experiment, name, attack, right predictions of each image, more).

    `more` may hold settings, on, scale, repeats, bank and chunks_done; see `Lab.cell`.
    """

    def make(*trials, subject="rush-cifar10@64", votes=64, norm="linf", eps=8 / 255, budget="quick", **about):
        entries, labels = [], {}
        for order, (experiment, name, attack, right, more) in enumerate(trials):
            more = {"repeats": 4 if votes else 1, "on": "", "scale": 1.0, **more, **about}
            scale, settings = more["scale"], {"trial": name, **does(experiment, name), **more.pop("settings", {})}
            how = {"experiment": experiment, "trial": name, "order": order, "settings": settings}
            cell = lab.cell(subject, attack, right, votes=votes, norm=norm, eps=scale * eps, **how, **more)
            result = lab.store.result(cell)
            labels = {**cell.labels, "norm": norm, "eps": eps, "budget_name": budget}
            entries.append(replace(result, labels={**cell.labels, "norm": norm, "eps": scale * eps}))
        return Evidence(subject, labels, tuple(entries_of(entries)))

    return make
