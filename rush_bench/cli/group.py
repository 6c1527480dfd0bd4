"""The `rush-bench` command: one thin module a subcommand, imported when it is called; torch only in their bodies.

Exit codes: 0 all asked for is complete, 1 a cell failed, 2 usage, 3 stopped with work left, 4 an optional package is
missing, 5 an audited claim does not stand, 130 interrupted. Errors meant for the user are one line on stderr; anything else
keeps its traceback.
"""

import contextlib
import errno
import importlib
import keyword
import os
import sys
from typing import Any

import click

from rush_bench.errors import BadInput, RushBenchError, out_of_memory, unknown_name
from rush_bench.version import __version__

COMMANDS = {
    "run": "Run a benchmark file, or a shipped one by its name: train, attack, write the tables.",
    "train": "Train a defence; the same command again continues where it stopped.",
    "import": "Bring published weights into the store: ACL, AdvCL, TRADES, SmoothAdv, Rebuffi 2021, ...",
    "ensemble": "Make one model of several, which predicts by the mean of their probabilities.",
    "attack": "Attack models of the store, or your own network.",
    "certify": "Certify smoothed models: radii within which no attack exists; read certificates.",
    "settle": "Run the experiments T0 to T16 that settle a defence's claim.",
    "compare": "Compare two defences, paired over the images that both were measured on.",
    "audit": "Audit a claim: experiments, checks of the attack's strength, verdict.",
    "corruptions": "Accuracy under common corruptions (CIFAR-10-C, CIFAR-100-C), and mCE.",
    "table": "Write and print the table of everything measured.",
    "figure": "Draw accuracy against eps, and attacked images.",
    "report": "Write one HTML page of everything measured: tables, figures, images, verdicts.",
    "export": "Attacked images and predictions of a defence, as npz files.",
    "merge": "Copy the records of other results folders into one.",
    "rename": "Rename a model and its records.",
    "rm": "Delete a model and its records.",
    "pack": "Put a results folder into one file, which can be read like the folder.",
    "unpack": "Extract a pack into a folder, to add to it.",
    "push": "Upload a model or a pack to the Hugging Face hub.",
    "pull": "Download a model or a pack from the Hugging Face hub.",
    "list": "List defences, data sets, suites, attacks, models and results.",
    "show": "Describe one name: settings, card, columns.",
    "docs": "Read the documentation: how numbers are made, what a verdict means, ...",
    "doctor": "What is installed, usable and writable here.",
}
INTERRUPTED = 130


class CommandLine(click.Group):
    """A click group that imports a subcommand's module when it is called, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command = importlib.import_module(f"rush_bench.cli.{module}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown_name("command", args[0], COMMANDS)
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            _once(command, ctx, rest)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RushBenchError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped; the same command continues", err=True)
            ctx.exit(INTERRUPTED)
        except OSError as error:
            # A full disk under our files is a RushBenchError already; here it is stdout that went away or is full.
            if error.errno not in (errno.EPIPE, errno.ENOSPC):
                raise
            _abandon_stdout()
            if error.errno == errno.ENOSPC:
                click.echo("error: cannot write the output: no space left on device; free some space", err=True)
            ctx.exit(1)
        except (MemoryError, RuntimeError) as error:
            if not (says := out_of_memory(error)):
                raise
            click.echo(f"error: {says}", err=True)
            ctx.exit(1)


def _once(command: click.Command, ctx: click.Context, args: list[str]) -> None:
    """BadInput where an option of one value is given twice, of which click would drop the first without a word."""
    try:
        *_, order = command.make_parser(click.Context(command, ctx)).parse_args(list(args))
    except click.UsageError:
        return  # the command itself says so, with its own usage
    for option in order:
        if isinstance(option, click.Option) and not (option.multiple or option.is_flag) and order.count(option) > 1:
            count = order.count(option)
            raise BadInput(f"{option.opts[0]} is given {count} times and takes one value; run the command once for each")


def _abandon_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's flush at exit does not complain again."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a test's stdout has no file number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="rush-bench")
def main() -> None:
    """Train, attack and tabulate randomised and contrastively pre-trained defences.

    \b
    rush-bench train rush --dataset stl10
    rush-bench attack --suite linf8 --models all
    rush-bench table --style paper

    Running the same command again finishes the work. Exit codes: 0 complete, 1 a cell failed, 2 usage,
    3 stopped with work left, 4 an optional package is missing, 5 an audited claim does not stand.
    """
