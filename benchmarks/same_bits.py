"""One benchmark file run by one process, by two, by submitit's local executor, and killed ten times: are all the bits the same?

    python benchmarks/same_bits.py [--kills 10] [--every 4]

Trains a tiny network and attacks it in chunks of five images. The killed run (two processes) gets SIGKILL, all of it at once,
whenever `--every` more files are there, and is started again by the same command. Compared is every file under models/ and
results/ by what it says, clocks left out. The last line counts files that are missing, left over or different: 0.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trials import content, lay_out

FILE = """
[[train]]
recipe = ["noise_sup", "simclr"]
dataset = "mine.npz"
preset = "smoke"
set.network = { name = "resnet", blocks = 1, width = 4 }

[[attack]]
models = ["noise_sup@2", "simclr"]
suite = "linf8-quick"
dataset = "mine.npz"
n = 20
chunk = 5
repeats = 2
set.pgd.steps = 2
set.eot = { steps = 2, draws = 2 }
set.apgd = { steps = 2, bank = 2 }
set.square.queries = 20
"""
WAYS = {
    "one process": [],
    "two processes": ["--workers", "2"],
    "submitit's local executor": ["--on", "local:2", "--ask", "timeout_min=10"],
}
OTHERS = ("jobs", "worker-2.log", ".index.json")  # logs, and what is read again where it is missing


def start(folder: Path, ways: list[str]) -> subprocess.Popen[bytes]:
    """`rush-bench run` on the file in `folder`, with all its processes in a session of their own."""
    line = [sys.executable, "-m", "rush_bench", "run", "same.toml", "--device", "cpu", *ways]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(line, cwd=folder, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def fresh(folder: Path) -> Path:
    """A folder with the images and the file."""
    folder.mkdir()
    lay_out(folder, models=False)
    (folder / "same.toml").write_text(FILE)
    return folder


def files(folder: Path) -> int:
    """How many there are of the results and models."""
    return sum(path.is_file() for top in ("models", "results") for path in (folder / top).rglob("*"))


def killed(folder: Path, kills: int, every: int) -> list[int]:
    """Run and kill, then let it finish; at how many files each kill came."""
    at: list[int] = []
    while len(at) < kills:
        process, begun = start(folder, WAYS["two processes"]), files(folder)
        while process.poll() is None and files(folder) < begun + every:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        at.append(files(folder))
    if start(folder, WAYS["two processes"]).wait():
        sys.exit("the killed run does not finish")
    return at


def said(folder: Path) -> dict[str, Any]:
    """What every file says, but for logs."""
    return {name: says for name, says in content(folder).items() if not {*Path(name).parts} & {*OTHERS}}


def apart(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Files that are missing, left over, or say something else."""
    return [
        name for name in sorted({*found, *wanted}) if name not in found or name not in wanted or found[name] != wanted[name]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--every", type=int, default=4)
    asked, bad, wanted = parser.parse_args(), 0, dict[str, Any]()
    with tempfile.TemporaryDirectory() as place:
        for name, ways in WAYS.items():
            if "--on" in ways and importlib.util.find_spec("submitit") is None:
                print(f"{name}: not installed, not tried")
                continue
            begun, folder = time.monotonic(), fresh(Path(place) / name.replace(" ", "-"))
            if code := start(folder, ways).wait():
                sys.exit(f"{name} ended with exit code {code}")
            found = said(folder)
            wanted = wanted or found
            bad += len(apart(found, wanted))
            chunks = sum("chunk-" in file for file in found)
            differ = f"{len(apart(found, wanted))} differ" if found is not wanted else f"of which {chunks} chunks of records"
            print(f"{name}: {len(found)} files, {differ} ({time.monotonic() - begun:.0f} s)", flush=True)
        begun, folder = time.monotonic(), fresh(Path(place) / "killed")
        at = killed(folder, asked.kills, asked.every)
        differ = apart(said(folder), wanted)
        print(
            f"{len(at)} SIGKILLs, at {', '.join(map(str, at))} files: {len(differ)} differ ({time.monotonic() - begun:.0f} s)"
        )
        bad += len(differ)
        for name in differ:
            print(f"  {name}", file=sys.stderr)
    print(f"files that are missing, left over or different: {bad}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
