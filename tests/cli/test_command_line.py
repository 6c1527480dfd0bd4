"""The group: help without torch, errors as exit codes, stdout that goes away."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rush_bench.cli import list as list_command
from rush_bench.cli.group import COMMANDS
from rush_bench.errors import BadInput, MissingPackage, RushBenchError, WorkLeft

WITHOUT_TORCH = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["list"]]
WITHOUT_TORCH += [["list", kind] for kind in ("defenses", "datasets", "suites", "attacks", "models", "results")]


def test_help_and_list_import_no_torch(tmp_path: Path, store: Path) -> None:
    code = f"""
import sys
from click.testing import CliRunner
from rush_bench.cli import main
for args in {WITHOUT_TORCH!r}:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and len(result.stdout) > 10, (args, result.output)
    assert "torch" not in sys.modules, args
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_names_its_options(rush_bench, name: str) -> None:
    result = rush_bench(name, "--help")
    assert result.exit_code == 0
    assert f"{name} [OPTIONS]" in result.stdout and "-h, --help" in result.stdout


def test_help_lists_every_command(rush_bench) -> None:
    text = rush_bench("--help").stdout
    print(text)
    assert [name for name in COMMANDS if f"\n  {name} " not in text] == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian"], "no command named 'trian'; did you mean 'train'?"),
        (["list", "dataset"], "did you mean 'datasets'?"),
        (["show", "digit"], "did you mean 'digits'?"),
        (["train", "rsuh", "--dataset", "digits"], "did you mean 'rush'?"),
        (["train", "rush", "--dataset", "digit"], "did you mean 'digits'?"),
        (["train", "rush", "--dataset", "digits", "--preset", "shrot"], "did you mean 'short'?"),
        (["train", "rush", "--dataset", "digits", "--set", "pretrain.epoch=1"], "did you mean 'pretrain.epochs'?"),
        (["train", "rush", "--dataset", "digits", "--set", "pretrain.epochs"], "key=value"),
        (["train", "rush", "--dataset", "digits", "--set", "pretrain.epochs=many"], "many"),
        (["train", "rush", "--dataset", "digits", "--config", "none.toml"], "none.toml"),
        (["train", "rush", "--dataset", "digits", "--device", "nonsense"], "--device auto"),
        (["train", "rush", "--dataset", "none.npz"], "none.npz"),
        (["train", "rush", "--dataset", "cifar10", "--data-dir", "empty"], "cifar10.npz"),
        (["table", "--style", "papers"], "did you mean 'paper'?"),
        (["table", "--format", "csv,markdow"], "no table format named 'markdow'"),
        (["table", "--results", "nothing"], "rush-bench attack"),
    ],
)
def test_a_wrong_name_is_one_line_with_the_fix(rush_bench, monkeypatch, args: list[str], says: str) -> None:
    monkeypatch.setattr("socket.socket.connect", _no_network)
    result = rush_bench(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr and result.stdout == ""


def _no_network(*args: object) -> None:
    raise OSError(errno.ENETUNREACH, "Network is unreachable")


@pytest.mark.parametrize(
    "args", [["attack", "--models", "a", "--suite", "linf8", "--suite=linf2"], ["certify", "a", "--seed", "1", "--seed", "1"]]
)
def test_an_option_of_one_value_is_taken_once(rush_bench, args: list[str]) -> None:
    result = rush_bench(*args)
    assert result.exit_code == 2 and "is given 2 times and takes one value" in result.stderr


def test_flags_and_lists_may_be_repeated(rush_bench) -> None:
    assert rush_bench("list", "--json", "suites", "--json").exit_code == 0
    assert "no model" in rush_bench("attack", "--models", "a", "--models", "b", "--suite", "linf8").stderr


def test_a_wrong_option_is_suggested(rush_bench) -> None:
    result = rush_bench("table", "--stile", "paper")
    assert result.exit_code == 2 and "--style" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [(RushBenchError("a"), 1), (BadInput("a"), 2), (WorkLeft("a"), 3), (MissingPackage("a"), 4)],
)
def test_each_kind_of_error_has_its_exit_code(rush_bench, monkeypatch, error: RushBenchError, code: int) -> None:
    monkeypatch.setattr(list_command.catalogue, "rows", _raising(error))
    result = rush_bench("list", "--json")
    assert (result.exit_code, result.stderr, result.stdout) == (code, "error: a\n", "")


def test_control_c_says_how_to_go_on(rush_bench, monkeypatch) -> None:
    monkeypatch.setattr(list_command.catalogue, "rows", _raising(KeyboardInterrupt()))
    result = rush_bench("list")
    assert (result.exit_code, result.stderr) == (130, "stopped; the same command continues\n")


def test_a_defect_keeps_its_traceback(rush_bench, monkeypatch) -> None:
    monkeypatch.setattr(list_command.catalogue, "rows", _raising(ZeroDivisionError("ours")))
    assert isinstance(rush_bench("list").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.18 GiB"),
        RuntimeError("CUDA error: out of memory\nSearch for it"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_says_what_to_do(rush_bench, monkeypatch, error: Exception) -> None:
    monkeypatch.setattr(list_command.catalogue, "rows", _raising(error))
    result = rush_bench("list")
    assert result.exit_code == 1 and result.stderr.startswith("error: out of memory (") and "smaller --memory" in result.stderr
    assert len(result.stderr) < 350


def _raising(error: BaseException):
    def rows(*args: object) -> None:
        raise error

    return rows


def test_a_reader_that_goes_away_is_no_error_message(process, tmp_path: Path) -> None:
    running = process(["list", "--json"], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    _, stderr = running.communicate(timeout=60)
    assert stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("args", [["list"], ["list", "--json"]])
def test_a_full_disk_under_stdout_is_one_line(process, tmp_path: Path, args: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        running = process(args, tmp_path, stdout=full, stderr=subprocess.PIPE)
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 1
    assert stderr == "error: cannot write the output: no space left on device; free some space\n"
