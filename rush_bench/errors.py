"""Errors that a user sees. Each says what is wrong and how to fix it, and carries the exit code of the command."""

import difflib
from collections.abc import Iterable, Mapping

DOES_NOT_STAND = 5  # the exit code of an audit that is complete and whose verdict is another word than `stands`


class RushBenchError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns (1: a cell failed)."""

    exit_code = 1


class BadInput(RushBenchError):
    """What the user gave (a name, a setting, a file, a data set, a network) cannot be used. Exit code 2."""

    exit_code = 2


class Busy(BadInput):
    """Another process is at the very work that was asked for. Exit code 2."""


class WorkLeft(RushBenchError):
    """Stopped on request with work left; the same command continues. Exit code 3."""

    exit_code = 3


class MissingPackage(RushBenchError):
    """An optional package is not installed; the message ends with the line that installs it. Exit code 4."""

    exit_code = 4


class Failure(str):
    """Why a cell failed, in words, with the exit code of its cause: an error or the failure of another cell (else 1)."""

    exit_code: int

    def __new__(cls, reason: str, cause: object = None) -> "Failure":
        failure = super().__new__(cls, reason)
        failure.exit_code = getattr(cause, "exit_code", 1)
        return failure


def failed_code(failed: Mapping[str, str]) -> int:
    """Exit code of a command some of whose cells failed: 4 where each lacks an optional package, else 1."""
    missing = MissingPackage.exit_code
    return missing if all(getattr(reason, "exit_code", 1) == missing for reason in failed.values()) else 1


def unknown_name(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name that is not among the known ones, with the nearest suggestion."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    return BadInput(f"no {kind} named {name!r}; {hint}")


def first_sentence(error: BaseException) -> str:
    """Of what an error says, without its full stop: torch adds paragraphs. The error's kind where it says nothing."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def out_of_memory(error: BaseException) -> str:
    """What to say where the device or the machine has no memory left; empty for another error. torch raises several kinds."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    words = ("out of memory", "ALLOC_FAILED", "allocate memory")
    if not kinds & {"MemoryError", "OutOfMemoryError"} and not any(word in str(error).partition("\n")[0] for word in words):
        return ""
    return (
        f"out of memory ({first_sentence(error)}); attack with a smaller --memory, train with a smaller batch "
        "(--set STAGE.batch_size=N), or free what others use; the same command continues"
    )
