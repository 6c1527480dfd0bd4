"""Every published number against a list typed from the papers, row by row."""

import json

import pytest

from rush_bench.errors import BadInput
from rush_bench.records.published import BLOCKS, FILE, published

# RUSH paper, Table 1: block, method, standard, PGD, AA, footnotes
TABLE1 = """
CIFAR-10 | RUSH I_F+ | 87.9 77.8 79.5 |
CIFAR-10 | RUSH I_F | 86.4 73.7 74.7 |
CIFAR-10 | RoCL | 83.7 40.2 - |
CIFAR-10 | Free-m | 85.9 46.8 - |
CIFAR-10 | AdvCL | 83.6 52.7 49.7 |
CIFAR-10 | SmoothAdv | 86.2 68.2 - | 4
CIFAR-10 | ACL | 82.5 52.8 49.3 | 1
CIFAR-10 | Data AUG | 83.5 59.9 57.0 | 1
CIFAR-10 | Data AUG | 92.2 - 66.5 | 2
CIFAR-100 | RUSH I_F+ | 57.1 46.6 - |
CIFAR-100 | RUSH I_F | 55.3 42.5 40.2 |
CIFAR-100 | AdvCL | 56.7 28.7 24.7 |
CIFAR-100 | Data AUG | 56.9 32.0 28.5 | 1
CIFAR-100 | Data AUG | 63.5 - 34.6 | 2
CIFAR-10 -> STL-10 | RUSH I_F+ | 73.7 53.3 55.9 |
CIFAR-10 -> STL-10 | RUSH I_F | 72.0 49.4 53.4 |
CIFAR-10 -> STL-10 | BYORL | - 24.1 - |
CIFAR-10 -> STL-10 | AdvCL | 63.5 37.7 34.7 |
STL-10 -> STL-10 | RUSH I_F+ | 76.7 64.6 67.0 |
STL-10 -> STL-10 | RUSH I_F | 75.1 61.5 60.2 |
"""

# sources S3.2, AA/clean: SLF, ALF, AFF
RESNET18_CIFAR10 = """
RoCL 26.12/77.90 29.69/75.62 45.02/78.51
ACL-DS 39.17/78.22 40.60/75.53 49.60/81.25
AdvCL 43.18/82.36 44.05/80.04 49.61/83.00
A-InfoNCE 42.72/83.70 43.28/80.30 49.73/82.99
DeACL 43.27/79.94 41.99/77.71 44.96/78.29
DynACL 45.09/75.41 45.67/72.97 50.52/81.86
RCS 44.29/77.14 45.75/74.95 49.63/80.70
DynACL-AIR 45.17/78.08 46.14/77.42 50.58/82.74
DynACL++ 46.54/79.82 47.98/78.81 50.34/81.93
DynACL-AIR++ 46.99/81.80 48.23/79.56 50.79/82.36
TARO 35.81/78.45
"""
ELSEWHERE = {  # sources S3.2, S3.3, AA/clean
    ("cifar100", "cifar100", "SLF"): "8.72/42.93 17.30/45.82 19.10/44.60 19.30/45.83 20.07/52.16 20.61/53.93 18.66/36.64",
    ("cifar100", "cifar100", "AFF"): "24.78/57.74 25.26/58.29 24.88/57.43 25.97/57.75",
    ("stl10", "cifar10", "SLF"): "27.52/56.5 28.38/62.78 29.17/52.41 29.64/55.84",
    ("stl10", "cifar10", "ALF"): "28.16/60.86 27.88/58.73",
    ("stl10", "cifar10", "AFF"): "32.66/61.41 33.84/68.14 35.25/63.53 35.66/63.74",
    ("stl10", "stl10", "SLF"): "26.51/78.19 35.80/67.90 46.61/69.56 47.71/72.25",
    ("stl10", "stl10", "AFF"): "43.21/72.55 48.10/73.10",
}
SUPERVISED = (  # sources S3.4, clean/AA
    "83.53/56.66 86.86/57.09 84.59/55.54 85.71/52.48 84.92/53.08 87.03/49.25 86.11/41.47 83.34/43.21 86.04/51.56 "
    "53.83/18.95 56.87/28.50 87.35/58.63"
)


def test_table_1_is_the_papers():
    typed = [[part.strip() for part in line.split("|")] for line in TABLE1.strip().splitlines()]
    assert len(typed) == len(published().table1)
    for (block, method, numbers, marks), row in zip(typed, published().table1, strict=True):
        assert (row.block, ",".join(row.footnotes)) == (block, marks)
        assert row.method.split(" (")[0] == method
        assert [row.standard, row.pgd, row.aa] == [None if x == "-" else float(x) for x in numbers.split()]


def test_systems_and_votes():
    systems = {"RUSH": "rush", "RoCL": "rocl", "Free-m": "free", "AdvCL": "advcl", "SmoothAdv": "smoothadv"}
    systems |= {"ACL": "acl", "Data": "dataaug", "BYORL": "byorl"}
    for row in published().table1:
        assert row.system == systems[row.method.split()[0]]
        assert row.votes == {"RUSH I_F+": 64, "RUSH I_F": 1, "RoCL": 0}.get(row.method.split(" (")[0])
        assert row.beside == ("2" not in row.footnotes)
    assert {row.block for row in published().table1} == set(BLOCKS)


def test_anchors_on_cifar10():
    found = {(a.method, a.protocol): (a.aa, a.clean) for a in published().anchors if a.section == "3.1" and a.aa}
    typed = {}
    for line in RESNET18_CIFAR10.strip().splitlines():
        method, *cells = line.split()
        for protocol, cell in zip(("SLF", "ALF", "AFF"), cells, strict=False):
            typed[method, protocol] = tuple(map(float, cell.split("/")))
    assert found == typed
    corrupted = {(a.method, a.protocol): a.corruptions for a in published().anchors if a.corruptions}
    assert corrupted == {
        ("ACL", "SLF"): 70.72,
        ("ACL", "AFF"): 72.50,
        ("AdvCL", "SLF"): 73.14,
        ("AdvCL", "AFF"): 73.91,
        ("DynACL", "SLF"): 68.67,
    }


@pytest.mark.parametrize("where", ELSEWHERE)
def test_anchors_elsewhere(where):
    found = [
        (a.aa, a.clean)
        for a in published().anchors
        if a.section in ("3.2", "3.3") and (a.dataset, a.pretrain_dataset, a.protocol) == where
    ]
    assert found == [tuple(map(float, pair.split("/"))) for pair in ELSEWHERE[where].split()]


def test_supervised_anchors():
    found = [(a.clean, a.aa) for a in published().anchors if a.section == "3.4"]
    assert found == [tuple(map(float, pair.split("/"))) for pair in SUPERVISED.split()]


def test_nothing_unverified_and_no_placeholder():
    text = FILE.read_text()
    assert "[M]" not in text
    for placeholder in ("37.92", "72.65", "80.65"):  # sources S3.2: repeated cells of the site, not measurements
        assert placeholder not in text
    assert all(a.extra_data for a in published().anchors if a.method in ("AdvCL", "A-InfoNCE"))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["table1"][0].update(block="CIFAR-11"),
        lambda d: d["table1"][0].update(footnotes=["9"]),
        lambda d: d["table1"][0].update(standard=787.9),
        lambda d: d["table1"][0].update(source=""),
        lambda d: d["table1"][0].update(protocol={"value": "SLF", "evidence": "[M] hearsay"}),
        lambda d: d["table1"][0].pop("pgd"),
        lambda d: d["anchors"][0].update(evidence="M"),
        lambda d: d["anchors"][0].update(clean=None, aa=None),
        lambda d: d.pop("footnotes"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, change):
    data = json.loads(FILE.read_text())
    change(data)
    path = tmp_path / "published.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BadInput, match=r"published\.json"):
        published(path)
