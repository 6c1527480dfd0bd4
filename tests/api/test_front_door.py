"""The public functions beside the command line: the same names, defaults and refusals, on networks in memory and of a store."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import rush_bench as rb
from rush_bench.api.named import Target
from rush_bench.audits.experiments import BUDGETS
from rush_bench.cli import main
from rush_bench.datasets import as_images
from rush_bench.errors import BadInput
from rush_bench.report.page import write_page
from tests.api.conftest import QUICK

SMALL = {"points": 2, "sweep": (1, 2), "steps": 2, "draws": 1, "lengths": (1, 2, 3), "restarts": 2, "losses_steps": 2}
SMALL |= {"rand": (2,), "rand_steps": 2, "banks": (2,), "part_steps": 2, "queries": (4,), "sweep_steps": 2, "votes": (1, 2)}
SMALL |= {"certificate": 200, "published": {"steps": 1, "queries": 2, "targets": 1}, "long": 3, "peers": 1, "targets": 1}


@pytest.fixture
def digits():
    return rb.load_dataset("digits", "test", 6)


def test_a_network_in_memory_is_attacked_and_its_table_prints(network, digits, capsys) -> None:
    run = rb.attack(rb.Deterministic(network, shape=digits.shape, name="mine"), QUICK, (digits.floats(), digits.labels))
    assert run.complete and run.folder == Path("results") and "records are in results" in capsys.readouterr().err
    assert repr(run) == "AttackRun(3 of 3 cells complete, in 'results')"
    table = run.table()
    assert table.frame.loc[0, "n"] == 6 and "mine" in str(table) and "mine" in repr(table) and "<td>mine" in table._repr_html_()
    assert [path.name for path in table.write("out")] == ["table.csv", "table.md", "table.tex"]
    assert rb.table("results").frame.equals(table.frame) and len(rb.load_results()) == 3


def test_models_of_a_store_by_name(store, capsys) -> None:
    run = rb.attack("tiny@1", QUICK, "digits", n=6, size=8, store=store, repeats=2, quiet=True)
    assert run.results[0].labels["defense"] == "tiny@1" and run.results[0].labels["n"] == 6
    assert capsys.readouterr().out == ""
    assert rb.attack(["tiny@1"], QUICK, n=6, store=store, repeats=2, quiet=True).results[0].folder == run.results[0].folder


def test_attacks_by_name_their_settings_and_a_part_of_the_table(network, digits) -> None:
    mine = rb.Deterministic(network, shape=digits.shape, name="mine")
    run = rb.attack(mine, "linf8", digits, attacks="clean, eot-apgd", settings={"eot-apgd.steps": 2}, quiet=True)
    assert {cell.labels["attack"] for cell in run.results} == {"clean", "eot-apgd", "worst"} and run.complete
    assert run.results[1].identity["attack"]["steps"] == 2
    table = rb.table(only={"defense": "mi*"}, sort="-worst", columns=["defense", "eot-apgd"])
    assert list(table.frame) == ["defense", "eot-apgd", "eot-apgd_low", "eot-apgd_high"] and len(table) == 1
    with pytest.raises(BadInput, match="no row is left with defense ours"):
        rb.table(only={"defense": ["ours"]})


def test_what_would_have_no_effect_is_refused(network, digits, store) -> None:
    mine = rb.Deterministic(network, shape=digits.shape)
    with pytest.raises(BadInput, match=r"shard '1/2'.*\(1, 2\)"):
        rb.attack(mine, QUICK, digits, shard="1/2")
    with pytest.raises(BadInput, match="give them to parse_suite"):
        rb.attack(mine, QUICK, digits, attacks=["clean"])
    for named, says in (({"n": 3}, "take a part of images"), ({"device": "cpu"}, "at hand is as it was made")):
        with pytest.raises(BadInput, match=says):
            rb.attack(mine, QUICK, digits, **named)
    with pytest.raises(BadInput, match="no attack is named in ','"):
        rb.attack(mine, "linf8", digits, attacks=",")
    for minutes in ("1", -1, float("nan")):
        with pytest.raises(BadInput, match="a number of minutes, at least 0"):
            rb.attack(mine, "linf8", digits, max_minutes=minutes)
    with pytest.raises(BadInput, match="bytes that a step may use"):
        rb.attack("tiny", QUICK, digits, store=store, memory=0)
    with pytest.raises(BadInput, match="precision would have no effect"):
        rb.attack(mine, QUICK, digits, precision="bfloat16")
    with pytest.raises(TypeError, match="unexpected argument stoer"):
        rb.attack("tiny", QUICK, digits, stoer=store)  # type: ignore[call-arg]
    with pytest.raises(BadInput, match=r"wrap it, as in rb\.Deterministic"):
        rb.attack(network, QUICK, digits)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="data= takes"):
        rb.attack(mine, QUICK)
    assert not Path("results").exists()


def test_a_target_is_the_network_of_a_function(monkeypatch, tmp_path) -> None:
    Path("own_front_net.py").write_text("from tests.api.conftest import linear\n")
    monkeypatch.syspath_prepend(tmp_path)
    target = Target("own_front_net:linear", noise="uniform:0.3", votes=4, name="ours")
    run = rb.attack(target, QUICK, "digits", n=6, repeats=2, quiet=True)
    assert {cell.labels["defense"] for cell in run.results} == {"ours@1", "ours@4"}


@pytest.mark.usefixtures("undrawn")
def test_a_claim_about_a_network_in_memory_is_audited(network, digits, monkeypatch, capsys) -> None:
    small = dataclasses.replace(BUDGETS["quick"], **SMALL)
    monkeypatch.setitem(BUDGETS, "quick", small)
    import rush_bench.audits.run as probes

    for name in ("flags", "truth", "indicators", "binarization"):  # they have tests of their own
        monkeypatch.setattr(probes, name, lambda *arguments: [])
    mine = rb.Deterministic(network, shape=digits.shape, name="mine")
    run = rb.audit(mine, digits, claim=90, budget="quick", eps=0.1)
    assert run.complete and run.words == {"mine": "refuted"}  # it was never trained
    assert repr(run) == "AuditRun(mine: refuted, in 'results')" and "trials of 1 defences complete" in repr(run.settled)
    assert "mine: about" in capsys.readouterr().err  # what it would cost was said
    assert "the claim of 90.0 % (stated with --claim) IS REFUTED" in " ".join(str(run).split())
    (path,) = Path("results/audit").glob("mine-*.json")
    assert json.loads(path.read_text())["verdict"]["word"] == "refuted" and path in run.paths
    assert rb.figure("attacks", "results", format="svg")[0].read_text().startswith("<?xml")


def test_a_plan_that_is_called_off_writes_nothing(network, digits) -> None:
    heard = []
    mine = rb.Deterministic(network, shape=digits.shape, name="mine")
    run = rb.audit(mine, digits, before=lambda planned: heard.append(planned), quiet=True)  # type: ignore[func-returns-value]
    assert heard and not run.complete and run.audits == [] and not Path("results").exists()


@pytest.fixture
def two(digits):
    """Two networks, the second on two thirds of the images."""
    runs = []
    for name, images, seed in (("one", digits, 0), ("two", digits.take([0, 2, 3, 5]), 1)):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()
        runs.append(rb.attack(rb.Deterministic(net, shape=digits.shape, name=name), QUICK, images, quiet=True))
    return runs


def test_a_table_of_certificates_of_which_none_is_finished_says_why(network, digits) -> None:
    class Fails(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x) / (x.flatten(1).amax(1, keepdim=True) < 1.2)  # not finite where the noise is large

    smoothed = rb.Smoothed(Fails().eval(), noise=rb.Gaussian(0.5), votes=1, shape=digits.shape, name="fails")
    run = rb.certify(smoothed, digits, draws=200, selection=20, quiet=True)
    with pytest.raises(BadInput, match=r"no certificate in results is finished; failed: fails.*not finite"):
        run.table()


def test_compare_pairs_the_images_that_both_have(two) -> None:
    frame = rb.compare("one", "two").frame.set_index("attack")
    assert (frame["n"] == 4).all()
    first, second = (next(cell.frame for cell in run.results if cell.labels["attack"] == "clean") for run in two)
    expected = np.mean(first["correct"].to_numpy()[[0, 2, 3, 5]]) - np.mean(second["correct"].to_numpy())
    assert frame.loc["clean", "difference"] == pytest.approx(100 * expected)
    assert (frame["difference_low"] <= frame["difference"]).all() and (frame["difference"] <= frame["difference_high"]).all()
    backwards = rb.compare("two", "one").frame.set_index("attack")
    assert np.allclose(backwards["difference"], -frame["difference"])


def test_a_comparison_of_long_names_is_a_table_on_80_columns(two) -> None:
    cells = rb.load_results()
    for cell in cells:
        cell.labels["defense"] = f"smoothed-supervised-cifar10-{cell.labels['defense']}@64"
    first, second = (f"smoothed-supervised-cifar10-{name}@64" for name in ("one", "two"))
    shown = rb.compare(first, second, cells)
    console = Console(width=80, color_system=None)
    with console.capture() as text:
        console.print(shown)
    lines = text.get().splitlines()
    assert lines[0] == f"A: {first}, B: {second}"
    assert sum(line.split()[:2] == ["Suite", "Attack"] for line in lines) == 1  # not a block for each row
    for row in shown.frame.to_dict("records"):
        assert any(f"{row['first']:.1f}" in line and f"{row['second']:.1f}" in line for line in lines)
    assert shown.to_markdown().startswith(f"| Data set | Threat | Suite | Attack | {first} | {second} | Difference | n |")


def test_compare_has_clean_images_once_and_attacks_as_a_table_has_them(two, digits) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()
    rb.attack(
        rb.Deterministic(net, shape=digits.shape, name="one"), "linf4-quick", digits, attacks=["clean", "pgd"], quiet=True
    )
    frame = rb.compare("one", "one").frame
    found = [
        (attack, None if np.isnan(eps) else round(255 * eps)) for attack, eps in zip(frame["attack"], frame["eps"], strict=True)
    ]
    assert found == [("clean", None), ("pgd", 4), ("worst", 4), ("pgd", 8), ("worst", 8)]


def test_compare_pairs_no_attacks_of_other_settings(network, digits) -> None:
    def attacked(name, seed, out="results", **settings):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()
        defense = rb.Deterministic(net, shape=digits.shape, name=name)
        rb.attack(defense, "linf4-quick", digits, attacks=["clean", "pgd"], settings=settings, quiet=True, out=out)

    weak = {"pgd.steps": 1, "pgd.step": 0.01}
    attacked("a", 0, **weak)
    attacked("b", 1)
    shown = rb.compare("a", "b")
    assert shown.frame["attack"].tolist() == ["clean"]
    says = "PGD at linf 4/255: PGD with step=0.01 (usual 0.25), steps=1 (usual 10), against as usual"
    assert f"Left out, settings differ: {says}." in shown.to_markdown()
    attacked("a", 0)  # whichever was made first or has the lower key
    usual = rb.compare("a", "b")
    assert usual.frame["attack"].tolist() == ["clean", "pgd", "worst"] and "settings" not in usual.to_markdown()
    strong = [
        cell.frame for cell in rb.load_results() if cell.labels["attack"] == "pgd" and cell.identity["attack"]["steps"] > 1
    ]
    expected = [frame["correct"].mean() for frame in strong]
    assert sorted(usual.frame.loc[1, ["first", "second"]] / 100) == pytest.approx(sorted(expected))
    for name, seed in (("a", 0), ("b", 1)):
        attacked(name, seed, "both", **weak)
    both = rb.compare("a", "b", "both")
    assert len(both) == 3 and "Both: PGD with step=0.01" in both.to_markdown()


def sets_of_images() -> list:
    """The same labels at the same positions, other pixels: both called `mine`."""
    pixels = torch.randint(0, 256, (20, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [as_images(x, torch.arange(20) % 10, name="mine") for x in (pixels, 255 - pixels)]


def test_compare_keeps_sets_of_images_of_one_name_apart(network) -> None:
    defenses = [rb.Deterministic(network, shape=(1, 16, 16), name=name) for name in ("a", "b")]
    sets, rates = sets_of_images(), {}
    for images in sets:
        rb.attack(defenses, "linf8-quick", images, attacks="clean,pgd", quiet=True)
        right = network(images.floats()).argmax(1) == images.labels
        rates[f"mine [{images.digest[:6]}]"] = 100 * float(right.float().mean())
    frame = rb.compare("a", "b").frame
    assert frame["attack"].tolist() == 2 * ["clean", "pgd", "worst"] and (frame["n"] == 20).all()
    clean = frame[frame["attack"] == "clean"].set_index("dataset")["first"]
    assert clean.to_dict() == pytest.approx(rates) and len(set(frame["dataset"])) == 2

    only = [cell for cell in rb.load_results("results") if cell.identity["images"] == sets[0].digest]
    assert set(rb.compare("a", "b", only).frame["dataset"]) == {"mine"}


def test_compare_refuses_other_images_of_one_name(network) -> None:
    for name, images in zip("ab", sets_of_images(), strict=True):
        rb.attack(rb.Deterministic(network, shape=(1, 16, 16), name=name), QUICK, images, quiet=True)
    with pytest.raises(BadInput, match="a and b share no finished attack on the same images"):
        rb.compare("a", "b")


def test_compare_says_where_pixels_of_a_registered_set_differ(network, digits) -> None:
    darker = dataclasses.replace(digits, pixels=digits.pixels // 2)
    for name, images in (("a", digits), ("b", darker)):
        rb.attack(rb.Deterministic(network, shape=digits.shape, name=name), QUICK, images, quiet=True)
    assert "other pixels at the same positions of digits" in rb.compare("a", "b").to_markdown()
    assert "other pixels" not in rb.compare("a", "a").to_markdown()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: (x[:2].repeat(10, 1, 1, 1), y[:2].repeat(10)), "18 of 20 images are copies of others: intervals are too"),
        (lambda x, y: (x, (y + 1) % 10), "accuracy is below chance: are the labels in the order"),
        (lambda x, y: (x, y), None),
    ],
)
def test_what_speaks_against_images_and_labels_is_said_wherever_they_are_used(network, change, says) -> None:
    pixels = rb.load_dataset("digits", "test", 300).floats()
    data = change(pixels, network(pixels).argmax(1))
    smoothed = rb.Smoothed(network, noise=rb.Gaussian(0.01), votes=4, shape=(1, 16, 16), name="soft")
    rb.attack(smoothed, QUICK, data, quiet=True, repeats=2)
    certified = rb.certify(smoothed, data, draws=100, selection=10, quiet=True)
    (summary,) = certified.summaries()
    shown = [certified.table().to_markdown(), str(summary["caveats"]), rb.compare("soft", "soft").to_markdown()]
    shown += [rb.table().to_markdown(), write_page(Path("results")).read_text(encoding="utf-8").split("Certificates")[-1]]
    for text in shown:
        assert (says in text) if says else ("copies of others" not in text and "below chance" not in text)


@pytest.mark.strangers
def test_compare_marks_upper_bounds(digits) -> None:
    class Rounds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))

        def forward(self, x):
            return self.layers((15 * x).round() / 15 + 0 * x)

    for name, net in (("rounds", Rounds().eval()), ("plain", Rounds().layers.eval())):
        rb.attack(rb.Deterministic(net, shape=digits.shape, name=name), QUICK, digits, quiet=True)
    text = rb.compare("rounds", "plain").to_markdown()
    rows = [[cell.strip() for cell in line.split("|")[4:7]] for line in text.splitlines() if line.startswith("| digits")]
    marked = {name: ("†" in first, "†" in second) for name, first, second in rows}
    assert marked == {"Clean": (False, False), "PGD": (True, False), "Worst": (True, False)} and "an upper bound" in text


def test_compare_refuses_what_it_cannot_pair(two, network, digits) -> None:
    with pytest.raises(BadInput, match="did you mean 'one'"):
        rb.compare("on", "two")
    other = dataclasses.replace(digits, labels=(digits.labels + 1) % 10)
    rb.attack(rb.Deterministic(network, shape=digits.shape, name="three"), QUICK, other, quiet=True, out="others")
    with pytest.raises(BadInput, match="other labels for the same images"):
        rb.compare("one", "three", ["results", "others"])
    for name, part in (("first", [0, 1, 2]), ("second", [0, 1])):  # positions in a set of the user's own name no image
        own = dataclasses.replace(digits.take(part), name="own")
        rb.attack(rb.Deterministic(network, shape=digits.shape, name=name), QUICK, own, quiet=True)
    with pytest.raises(BadInput, match="share no finished attack"):
        rb.compare("first", "second")


def test_the_command_is_the_function(two, monkeypatch) -> None:
    from click.testing import CliRunner

    result = CliRunner().invoke(main, ["compare", "one", "two", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(rb.compare("one", "two").frame.to_json(orient="records"))
    drawn = CliRunner().invoke(main, ["figure", "eps", "results", "--format", "pdf", "--out", "drawn"])
    assert drawn.exit_code == 0, drawn.output
    assert Path("drawn/robust_accuracy.pdf").read_bytes().startswith(b"%PDF")
    wrong = CliRunner().invoke(main, ["figure", "waterfal"])
    assert wrong.exit_code == 2 and "did you mean 'waterfall'" in wrong.stderr


def test_numbers_as_people_give_them(network, digits, tmp_path) -> None:
    """One radius, an eps as the command takes it, a seed of numpy; and what is none of these is refused in a sentence."""
    smoothed = rb.Smoothed(network, noise="gaussian:0.25", votes=2, shape=digits.shape, name="mine")
    run = rb.certify(smoothed, digits, draws=100, radii=0.25, seed=np.int64(1), out=tmp_path, quiet=True)
    assert run.radii == (0.25,) and run.complete
    for wrong in ("0.25", None, object()):
        with pytest.raises(BadInput, match=r"radii .* must be a number in pixel units"):
            rb.certify(smoothed, digits, radii=wrong, out=tmp_path, quiet=True)
    seen = []

    def stop(planned):
        seen.append(planned)
        return False

    rb.audit(smoothed, digits, claim=50, eps="8/255", budget="quick", out=tmp_path, quiet=True, before=stop)
    assert seen
    for wrong in ("eight", None, True):
        with pytest.raises(BadInput, match=r"eight|is no radius"):
            rb.audit(smoothed, digits, claim=50, eps=wrong, budget="quick", out=tmp_path, quiet=True, before=stop)
    with pytest.raises(BadInput, match=r"as_module takes a defence, not .*rb\.Deterministic"):
        rb.as_module(network)
    with pytest.raises(BadInput, match="noise=uniform:0 is no noise"):
        rb.train("pgd_at", dataset="digits", preset="smoke", noise="uniform:0", store=tmp_path)


def test_an_image_that_is_there_twice_is_refused_before_anything_runs(tmp_path) -> None:
    """An interval would take it for one more that was drawn."""
    mine = rb.Deterministic(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval(), shape=(1, 8, 8), name="mine"
    )
    twice = rb.load_dataset("digits", "test", n=5, size=8).take([0, 1, 1, 2])
    for call in (
        lambda: rb.attack(mine, QUICK, twice, out=tmp_path / "out"),
        lambda: rb.audit(mine, twice, out=tmp_path / "out"),
    ):
        with pytest.raises(BadInput, match="4 images stand at 3 positions of digits; take each position once"):
            call()
    assert not (tmp_path / "out").exists()
