"""Tables recomputed by hand from small records; what must never be merged, ranked or printed."""

import numpy as np
import pytest

import rush_bench as rb
from rush_bench.errors import BadInput
from rush_bench.records.statistics import any_of_k, clopper_pearson, interval
from rush_bench.report.layout import lay_out
from rush_bench.report.tables import table

TWENTY = np.arange(20)


def ones(k, n=20):
    """k right of n, one prediction each."""
    return (np.arange(n) < k).astype(int)


def line(frame, **where):
    for name, value in where.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


def test_deterministic_numbers_by_hand(lab):
    lab.cell("acl-cifar10", "clean", ones(17))
    lab.cell("acl-cifar10", "pgd", ones(9))
    lab.cell("acl-cifar10", "aa", ones(8))
    row = line(table(lab.results()), defense="acl-cifar10")
    assert (row["clean"], row["pgd"], row["aa"]) == (85.0, 45.0, 40.0)
    assert (row["pgd_low"], row["pgd_high"]) == pytest.approx([100 * x for x in clopper_pearson(9, 20)])
    assert (row["threat"], row["suite"], row["n"], row["K"]) == ("linf 8/255", "linf8", 20, 1)
    assert np.isnan(row["eot"]) and np.isnan(row["worst"]) and np.isnan(row["worst_any10"])


def test_randomised_numbers_by_hand(lab):
    right = TWENTY % 17
    lab.cell("rush-cifar10@64", "aa", right, repeats=16, votes=64, bank=ones(5))
    lab.cell("rush-cifar10@64", "worst", right, repeats=16, votes=64)
    row = line(table(lab.results()), defense="rush-cifar10@64")
    assert row["aa"] == pytest.approx(100 * right.mean() / 16)
    _, *expected = interval(right, np.full(20, 16), deterministic=False)
    assert (row["aa_low"], row["aa_high"]) == pytest.approx([100 * x for x in expected])
    assert row["aa_bank"] == 25.0
    assert (row["aa_bank_low"], row["aa_bank_high"]) == pytest.approx([100 * x for x in clopper_pearson(5, 20)])
    assert row["worst_any10"] == pytest.approx(100 * np.mean(1 - any_of_k(right, np.full(20, 16), 10)))
    assert (row["worst_any10_low"], row["worst_any10_high"]) == pytest.approx(
        [100 * x for x in clopper_pearson(row["worst_any10"] / 5, 20)]
    )
    assert (row["K"], row["extra_data"]) == (16, "none")


def test_unfinished_cells_are_never_a_number(lab):
    lab.cell("acl-cifar10", "clean", ones(17), chunks_done=1)
    lab.cell("acl-cifar10", "pgd", ones(9), chunks_done=1)
    lab.cell("acl-cifar10", "aa", ones(8), chunks_done=0)
    for style in ("plain", "paper"):
        frame = table(lab.results(), style)
        names = ["clean", "pgd", "aa"] if style == "plain" else ["measured_standard", "measured_pgd", "measured_aa"]
        assert frame[names].isna().all(axis=None)
        notes = " ".join(frame["notes"].dropna())
        assert "clean: 1 of 2 chunks" in notes and "aa: 0 of 2 chunks" in notes


@pytest.mark.parametrize("style", ["plain", "paper"])
@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_are_shown_where_rows_differ_in_them(lab, style, seed) -> None:
    lab.cell("acl-cifar10", "pgd", ones(9))
    lab.cell("acl-cifar10" if seed else "trades-cifar10", "pgd", ones(8), seed=seed)
    layout = lay_out(table(lab.results(), style))
    assert ("seed" in layout.columns) == bool(seed)
    if seed:
        at = layout.columns.index("seed")
        assert {line[at] for line in layout.cells} - {"–"} == {"0", "1"}


@pytest.mark.parametrize(
    "other",
    [
        {"right": ones(9, 40)},
        {"seed": 1},
        {"weights": "retrained"},
        {"eps": 4 / 255, "suite": "linf4"},
        {"norm": "l2", "eps": 0.5, "suite": "l2-0.5"},
        {"suite": "linf8-quick", "settings": {"steps": 10}},
        {"dataset": "cifar100"},
    ],
)
def test_what_differs_has_a_row_of_its_own(lab, other):
    lab.cell("acl", "pgd", ones(9))
    lab.cell("acl", "aa", other.pop("right", ones(3)), **other)
    frame = table(lab.results())
    assert len(frame) == 2
    assert (frame["pgd"].notna() + frame["aa"].notna()).tolist() == [1, 1]


def test_one_attack_under_two_settings_has_two_rows(lab):
    lab.cell("acl", "clean", ones(19))
    aa = lab.cell("acl", "aa", ones(8))
    for steps, k in ((20, 9), (40, 7)):
        pgd = lab.cell("acl", "pgd", ones(k), settings={"steps": steps})
        lab.cell("acl", "worst", ones(k - 4), of=[pgd, aa])
    frame = table(lab.results())
    for k, steps in ((9, 20), (7, 40)):
        row = line(frame, pgd=5.0 * k)
        assert (row["clean"], row["aa"], row["worst"]) == (95.0, 40.0, 5.0 * (k - 4))
        assert row["notes"] == f"pgd with steps={steps}"
    assert len(frame) == 2


def test_clean_joins_every_threat(lab):
    lab.cell("acl", "clean", ones(19), suite="linf8")
    lab.cell("acl", "clean", ones(19), suite="linf4")
    lab.cell("acl", "pgd", ones(9), suite="linf8")
    lab.cell("acl", "pgd", ones(12), suite="linf4", eps=4 / 255)
    frame = table(lab.results())
    assert frame["clean"].tolist() == [95.0, 95.0] and frame["pgd"].tolist() == [60.0, 45.0]


def test_clean_alone_is_a_row(lab):
    lab.cell("acl", "clean", ones(19))
    assert line(table(lab.results()), defense="acl")["threat"] == "none"
    assert line(table(lab.results(), "paper"), measured_as="acl")["measured_standard"] == 95.0


def test_nothing_measured_still_lays_out_the_paper():
    frame = table([], "paper")
    assert len(frame) == 20
    assert frame[[name for name in frame if name.startswith("measured")]].isna().all(axis=None)
    assert line(frame, block="CIFAR-10", method="RUSH I_F+")["published_pgd"] == 77.8
    assert table([]).empty


def test_measured_stands_beside_its_published_row(lab):
    for votes, k in ((64, 10), (1, 8), (16, 9)):
        lab.cell(f"rush-cifar10@{votes}", "pgd", ones(k), votes=votes)
    lab.cell("acl-cifar10", "pgd", ones(5))
    lab.cell("simclr-cifar10", "pgd", ones(0))
    lab.cell("dataaug-cifar10", "aa", ones(7))
    frame = table(lab.results(), "paper")
    beside = {row["method"].split(" (")[0]: row["measured_pgd"] for _, row in frame[frame["measured_as"].notna()].iterrows()}
    assert (beside["RUSH I_F+"], beside["RUSH I_F"], beside["ACL"]) == (50.0, 40.0, 25.0)
    assert (beside["rush-cifar10@16"], beside["simclr-cifar10"]) == (45.0, 0.0)
    augmented = frame[frame["method"].str.startswith("Data AUG") & (frame["block"] == "CIFAR-10")]
    assert augmented["measured_aa"].isna().tolist() == [False, True]  # not beside the WideResNet-70-16
    assert frame["block"].tolist()[:11] == ["CIFAR-10"] * 11  # what the paper does not have follows in its block
    assert frame.loc[frame["method"] == "simclr-cifar10", "published_pgd"].isna().all()


@pytest.mark.parametrize(
    "dataset, before, block",
    [
        ("cifar10", "cifar10", "CIFAR-10"),
        ("cifar100", "cifar100", "CIFAR-100"),
        ("stl10", "cifar10", "CIFAR-10 -> STL-10"),
        ("stl10", "stl10", "STL-10 -> STL-10"),
        ("stl10", None, "STL-10"),
        ("digits", "digits", "digits"),
    ],
)
def test_blocks(lab, dataset, before, block):
    lab.cell("rush@64", "pgd", ones(3), votes=64, dataset=dataset, pretrain_dataset=before)
    row = line(table(lab.results(), "paper"), measured_as="rush@64")
    assert row["block"] == block
    assert (row["method"] == "rush@64") == (block in ("STL-10", "digits"))


def test_paper_takes_only_8_of_255_the_full_suite_and_the_largest_n(lab):
    lab.cell("rush@64", "pgd", ones(19), votes=64, eps=4 / 255, suite="linf4")
    lab.cell("rush@64", "pgd", ones(18, 30), votes=64, suite="linf8-quick", settings={"steps": 10})
    lab.cell("rush@64", "pgd", ones(10), votes=64)
    row = line(table(lab.results(), "paper"), measured_as="rush@64")
    assert (row["measured_pgd"], row["suite"], row["n"]) == (50.0, "linf8", 20)
    lab.cell("rush@64", "pgd", ones(10, 40), votes=64)
    assert line(table(lab.results(), "paper"), measured_as="rush@64")["n"] == 40


def test_apgd_is_never_aa(lab):
    lab.cell("rush@64", "apgd", ones(10), votes=64, suite="linf8-quick", bank=ones(4))
    row = line(table(lab.results(), "paper"), measured_as="rush@64")
    assert row[["measured_aa", "measured_aa_bank", "measured_aa_fresh"]].isna().all()
    assert row["measured_apgd"] == 50.0
    assert np.isnan(table(lab.results()).iloc[0]["aa"])


def test_retrained_models_of_one_name_are_both_shown(lab):
    lab.cell("rush@64", "pgd", ones(10), votes=64)
    lab.cell("rush@64", "pgd", ones(4), votes=64, weights="retrained", model="rush")
    frame = table(lab.results(), "paper")
    assert sorted(frame["measured_pgd"].dropna()) == [20.0, 50.0]


def test_a_damaged_chunk_stops_the_table(lab):
    cell = lab.cell("acl", "pgd", ones(9))
    path = lab.store.folder(cell) / "chunk-0001.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadInput, match=r"chunk-0001\.npz.*delete it"):
        table(lab.results())


def test_wrong_style():
    with pytest.raises(BadInput, match="did you mean 'paper'"):
        table([], "papr")


def experiments(lab):
    """Two trials of one attack and two worst cases, as `settle` leaves them."""
    for trial, attack, right in (("CE", "eot-apgd", 0), ("T=20", "eot-apgd", 4), ("all", "worst", 0), ("minimum", "worst", 4)):
        settings = {"trial": trial}
        lab.cell("a@1", attack, [right] * 12, repeats=4, votes=1, settings=settings, experiment="T4", trial=trial, on="")


def certificate(lab):
    """A cell of mode fixed, with the counts of its draws alone."""
    lab.cell("a@1", "certify", [4] * 12, repeats=4, votes=1, suite="fixed")


@pytest.mark.parametrize(
    ("write", "says"), [(experiments, "experiments of settle.*read its tables"), (certificate, "certificates.*certify --read")]
)
def test_what_is_no_attack_is_in_no_table_and_no_comparison(lab, write, says):
    write(lab)
    for make in (lambda: rb.table(lab.folder), lambda: rb.compare("a@1", "a@1", lab.folder)):
        with pytest.raises(BadInput, match=says):
            make()
    lab.cell("a@1", "eot-apgd", [3] * 12, repeats=4, votes=1)
    assert rb.table(lab.folder).frame["eot-apgd"].tolist() == [75]
    assert rb.compare("a@1", "a@1", lab.folder).frame["first"].tolist() == [75]
