"""Kill, damage and range trials of what is kept on disk: nothing is lost, nothing stays behind, no number is wrong.

    python benchmarks/trials.py [--kills 12] [--damages 300] [--seed 0]

Kills: each of train, attack, certify and corruptions on a tiny network gets SIGKILL at random moments; the same command then
has to finish with the bits of an undisturbed run and leave no other file. Damage: bytes flipped, cut or swapped in records,
cards, weights and checkpoints; whoever reads them has to refuse, leave the cell out, or give the same numbers. Ranges: numbers
of the command line far outside what they may be; each has to be refused before a file appears. The last line counts
wrong numbers, files left for good and tracebacks: all must be 0. `tests/test_trials.py` runs a small round of it.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

NETWORK = ["--set", "network.name=resnet", "--set", "network.blocks=1", "--set", "network.width=4"]
TRAIN = ["train", "noise_sup", "--dataset", "mine.npz", "--preset", "smoke", "--name", "mine", *NETWORK]
SUITE = [
    "--suite",
    "linf8-quick",
    "--n",
    "20",
    "--chunk",
    "5",
    "--repeats",
    "2",
    "--set",
    "pgd.steps=2",
    "--set",
    "apgd.steps=2",
]
SUITE += ["--set", "eot.steps=2", "--set", "eot.draws=2", "--set", "apgd.bank=2", "--set", "square.queries=20"]
COMMANDS = {
    "train": TRAIN,
    "attack": ["attack", "--models", "mine@2", "--dataset", "mine.npz", *SUITE],
    "certify": ["certify", "mine", "--dataset", "mine.npz", "--n", "20", "--draws", "200", "--n0", "10", "--alpha", "0.01"],
    "corruptions": ["corruptions", "wide@2", "--data-dir", "data", "--n", "8", "--chunk", "4", "--repeats", "2"],
}
RANGES = {  # options and what they must not be
    "--seed": ("-1", str(2**63), str(2**70), "1.5", "nan"),
    "--n": ("0", "-3", "1.5", "many", "²"),
    "--chunk": ("0", "-1", "x"),
    "--repeats": ("0", "-1"),
    "--shard": ("0/2", "3/2", "1", "a/b", "1/0", "²/3"),
    "--max-minutes": ("-1", "soon"),
    "--memory": ("0", "-1"),
}
CLOCKS = ("seconds", "environment", "time")  # what differs between two equal runs


def run(*line: str) -> Any:
    """A command in this process."""
    from rush_bench.cli import main

    return CliRunner().invoke(main, list(line))


def but(line: list[str], option: str, value: str) -> list[str]:
    """The line with another value of an option."""
    if option not in line:
        return [*line, option, value]
    place = line.index(option)
    return [*line[:place], option, value, *line[place + 2 :]]


def child(folder: Path, line: list[str]) -> multiprocessing.Process:
    """A command in a process of its own, in `folder`."""

    def work() -> None:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        from rush_bench.cli import main

        main(line, standalone_mode=True)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def exact(values: np.ndarray) -> str:
    """An array's values in full, in which what was not measured (NaN) equals itself."""
    return str(values.tolist())


def lay_out(folder: Path, models: bool = True) -> None:
    """Images of five classes told apart by brightness, a corruption of CIFAR's shape, and a model for each, if wanted."""
    import torch

    from rush_bench.datasets.corruptions import USUAL
    from rush_bench.networks import build
    from rush_bench.store import save_model

    draw, arrays = np.random.default_rng(0), {"classes": np.array(list("abcde"))}
    for part, count in (("train", 60), ("test", 20)):
        labels = np.arange(count) % 5
        arrays[f"{part}_images"] = (labels[:, None, None] * 50 + draw.integers(0, 25, (count, 8, 8))).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    np.savez(folder / "mine.npz", **arrays)
    (folder / "data" / "CIFAR-10-C").mkdir(parents=True)
    for name in USUAL:
        np.save(folder / "data" / "CIFAR-10-C" / f"{name}.npy", draw.integers(0, 256, (50, 32, 32, 3), np.uint8))
    np.save(folder / "data" / "CIFAR-10-C" / "labels.npy", np.tile(np.arange(10), 5))
    for name, dataset, size in (("mine", "mine", 8), ("wide", "cifar10", 32)) * models:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            channels, classes = (1, 5) if size == 8 else (3, 10)
            spec = {"name": "resnet", "blocks": [1], "width": 4, "classes": classes, "channels": channels, "size": size}
            net = build(spec)
        card = {"name": name, "recipe": "noise_sup", "dataset": dataset, "pretrain_dataset": None, "preset": "smoke"}
        card |= {"network": net.spec, "noise": {"law": "gaussian", "scale": 0.1}, "votes": [1, 2], "protocol": "supervised"}
        save_model(folder / "models" / name, card, net.state_dict())


def content(folder: Path) -> dict[str, Any]:
    """Every file under models/ and results/ by what it says, clocks left out."""
    import json

    found: dict[str, Any] = {}
    for path in sorted(p for top in ("models", "results") for p in (folder / top).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".npz":
            with np.load(path) as file:
                found[name] = {key: exact(file[key]) for key in file.files if key not in CLOCKS}
        elif path.name == "card.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in (*CLOCKS, "digest")}
        elif path.suffix in (".tsv", ".csv", ".md", ".png", ".tex"):
            found[name] = None  # made from the records, with clocks in them
        else:
            found[name] = path.read_bytes()
    return found


def kills(folder: Path, count: int, draw: random.Random) -> dict[str, int]:
    """SIGKILL each command `count` times, one to three times a run, and let the same command finish."""
    import rush_bench.cli.train
    import rush_bench.evaluation.certificates  # here, so that each child need not
    import rush_bench.evaluation.corruptions
    import rush_bench.training.run  # noqa: F401

    said = dict.fromkeys(("kills", "moments", "left for good", "wrong numbers"), 0)
    for name, line in COMMANDS.items():
        start = folder / f"{name}-start"
        start.mkdir()
        lay_out(start)
        if name == "train":
            shutil.rmtree(start / "models" / "mine")
        whole = shutil.copytree(start, folder / f"{name}-whole")
        begun = time.monotonic()
        process = child(whole, line)
        process.join()
        length, wanted = time.monotonic() - begun, content(whole)
        if process.exitcode:
            raise SystemExit(f"{name} fails on its own: exit code {process.exitcode}")
        done, states = 0, set[int]()
        while done < count:
            place = shutil.copytree(start, folder / f"{name}-{done}")
            for _ in range(draw.randint(1, 3)):
                process = child(place, line)
                process.join(timeout=draw.uniform(0.02, 1.0) * length)
                if process.exitcode is None:
                    process.kill()
                    process.join()
                    done += 1
                    states.add(sum(1 for _ in (place / "results").rglob("*")) + sum(1 for _ in (place / "models").rglob("*")))
            process = child(place, line)
            process.join()
            found = content(place)
            for key in found.keys() ^ wanted.keys():
                print(f"{name}: {key} is {'left over' if key in found else 'missing'}", file=sys.stderr)
            said["left for good"] += len(found.keys() - wanted.keys())
            said["wrong numbers"] += process.exitcode != 0 or any(found.get(key) != wanted[key] for key in wanted)
            shutil.rmtree(place)
        said["kills"] += done
        said["moments"] += len(states)
    return said


def damages(folder: Path, count: int, draw: random.Random) -> dict[str, int]:
    """Damage one file at a time; `table`, `attack` again and the weights must refuse, leave it out, or say the same."""
    import torch

    from rush_bench.errors import RushBenchError
    from rush_bench.records import load_results
    from rush_bench.store import read_card, read_weights
    from rush_bench.training.checkpoint import CheckpointFile

    lay_out(folder)
    os.chdir(folder)
    run(*COMMANDS["attack"])
    run(*COMMANDS["certify"])
    file = CheckpointFile(folder / "models" / "half", {"seed": 0})
    file.save({"weight": torch.arange(100.0), "step": 3})

    def numbers(result: Any) -> tuple[str, str]:
        frame = result.frame.drop(columns="seconds")
        return str((result.identity, result.labels)), exact(frame.to_numpy(float))

    def records() -> Iterator[tuple[str, Any]]:
        for top in ("results", "results/certificates"):
            for result in load_results(Path(top), warn=lambda text: None):
                if result.complete:
                    yield numbers(result)

    def models() -> Iterator[tuple[str, Any]]:
        for name in ("mine", "wide"):
            yield (
                name,
                (read_card(Path("models"), name), {k: v.tolist() for k, v in read_weights(Path("models"), name).items()}),
            )

    def checkpoints() -> Iterator[tuple[str, Any]]:
        held = file.load(torch.device("cpu"))
        yield "half", held and (held["weight"].tolist(), held["step"])

    readers: tuple[Callable[[], Iterator[tuple[str, Any]]], ...] = (records, models, checkpoints)
    wanted = {key: value for read in readers for key, value in read()}
    files = sorted(
        p for top in ("models", "results/runs", "results/corruptions/runs") for p in Path(top).rglob("*") if p.is_file()
    )
    said = dict.fromkeys(("damaged files", "refused", "left out or not done", "no trace", "tracebacks", "wrong numbers"), 0)
    for _ in range(count):
        path, kind = draw.choice(files), draw.choice(("flip", "cut", "swap", "empty"))
        before = path.read_bytes()
        if kind == "flip":
            at = draw.randrange(len(before))
            after = before[:at] + bytes([before[at] ^ draw.randrange(1, 256)]) + before[at + 1 :]
        elif kind == "swap":
            after = draw.choice([p for p in files if p.suffix == path.suffix]).read_bytes()
        else:
            after = before[: draw.randrange(len(before))] if kind == "cut" else b""
        path.write_bytes(after)
        said["damaged files"] += 1
        found: dict[str, Any] = {}
        outcome = "no trace"
        for read in readers:
            try:
                for key, value in read():
                    found[key] = value
            except RushBenchError:
                outcome = "refused"
            except Exception as error:  # what a user would see as a traceback
                print(f"{path} ({kind}): {type(error).__name__}: {error}", file=sys.stderr)
                outcome = "tracebacks"
        if any(wanted.get(key) != value for key, value in found.items()):
            print(f"{path} ({kind}): another number", file=sys.stderr)
            outcome = "wrong numbers"
        elif outcome == "no trace" and len(found) < len(wanted):
            outcome = "left out or not done"
        said[outcome] += 1
        path.write_bytes(before)
    return said


def ranges(folder: Path) -> dict[str, int]:
    """Numbers of the command line that mean nothing: exit code 2, in a line, before a file appears."""
    lay_out(folder)
    os.chdir(folder)
    said = dict.fromkeys(("settings swept", "not refused", "tracebacks"), 0)
    from rush_bench.cli import main

    for name, line in COMMANDS.items():
        command = main.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        for option in RANGES.keys() & known:
            for value in RANGES[option]:
                found = run(*but(line, option, value))
                said["settings swept"] += 1
                said["not refused"] += found.exit_code != 2
                said["tracebacks"] += found.exception is not None and not isinstance(found.exception, SystemExit)
                if found.exit_code != 2:
                    print(f"{name} {option} {value}: exit code {found.exit_code}", file=sys.stderr)
    said["not refused"] += Path("results").exists()
    return said


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and print their figures; 1 where a figure that must be 0 is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="of each of the four commands")
    parser.add_argument("--damages", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    draw, here, bad = random.Random(asked.seed), Path.cwd(), 0
    with tempfile.TemporaryDirectory() as place:
        for name, trial in (
            ("kills", lambda folder: kills(folder, asked.kills, draw)),
            ("damage", lambda folder: damages(folder, asked.damages, draw)),
            ("ranges", ranges),
        ):
            (Path(place) / name).mkdir()
            begun = time.monotonic()
            try:
                said = trial(Path(place) / name)
            finally:
                os.chdir(here)
            figures = ", ".join(f"{value} {key}" for key, value in said.items())
            print(f"{name}: {figures} ({time.monotonic() - begun:.0f} s)", flush=True)
            bad += sum(said.get(key, 0) for key in ("left for good", "wrong numbers", "tracebacks", "not refused"))
    print(f"wrong numbers, files left for good, tracebacks, settings not refused: {bad}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
