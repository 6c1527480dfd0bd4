"""`rush-bench audit`: settle a claim, probe the defence, check the attack's strength, and give the verdict."""

import time
from typing import TYPE_CHECKING, Any

import click

from rush_bench.cli import common
from rush_bench.cli.settle import options, settled
from rush_bench.errors import BadInput, WorkLeft

if TYPE_CHECKING:
    from rush_bench.audit.book import Book
    from rush_bench.audit.verdict import Claim


@click.command()
@options
@click.option("--claim", help="Accuracy under attack that is claimed, in percent.  [default: published, else the replay's]")
@common.as_json
def command(as_json: bool, claim: str | None, **asked: Any) -> None:
    """Settle the claim of models of the store (rush@64) or of --model, and give the verdict by docs/verdict.md.

    \b
    rush-bench audit rush@64 --dataset cifar10 --budget quick
    rush-bench audit rush@64 --dataset cifar10 --claim 77.8

    It runs the experiments of `rush-bench settle` that are missing, then its probes. Running the same command again, from
    any number of processes, finishes the work.
    """
    if asked["only"]:
        raise BadInput("audit needs every experiment; for some of them use rush-bench settle --only")
    stated = _stated(claim)
    with common.quiet_stdout():
        begun = time.monotonic()
        run = settled(asked)
        from rush_bench.audit import run as audits
        from rush_bench.report import audits as shown
        from rush_bench.report import settle as report
        from rush_bench.report.settle_figures import write_figures
        from rush_bench.threats import Threat

        deadline = None if asked["max_minutes"] is None else begun + 60 * asked["max_minutes"]
        found = []
        for defenses, data in run.pairs if not asked["plan_only"] else ():
            names = {defense.name for defense in defenses}
            books = [book for book in run.books if book.subject in names and book.labels.get("dataset") == data.name]
            if not books:
                continue
            threat = Threat(books[0].labels["norm"], books[0].labels["eps"])
            how: dict[str, Any] = {"seed": asked["seed"], "deadline": deadline, "failed": run.failed}
            probes = audits.probe(defenses, data, threat, asked["out"], **how)
            found += [audits.judge(book, probes.get(book.subject), stated or published_claim(book)) for book in books]
        paths = [*report.write(run.books, run.folder), *write_figures(run.books, run.folder)] if found else []
        for one in found:
            paths += shown.write(one, asked["out"])
        for path in paths:
            click.echo(f"wrote {path}", err=True)
    if as_json:
        said = {"failed": run.failed, "contradictions": [str(one) for one in run.contradictions]}
        common.print_json({**said, "audits": [one.to_dict() for one in found]})
    else:
        for one in found:
            common.print_rows(report.title(one.book), *shown.lay_out(one, sources=False))
            click.echo(shown.sentence(one) + "\n")
    if not asked["plan_only"]:
        common.finish(run, asked["shard"], "tables wait")
    if run.complete and any(one.verdict is None for one in found):
        raise WorkLeft("stopped with probes left; the same command continues")


def _stated(claim: str | None) -> "Claim | None":
    if claim is None:
        return None
    from rush_bench.audit.verdict import Claim
    from rush_bench.settings import parse_number

    percent = parse_number(claim.rstrip("% "))
    if not 1 < percent <= 100:
        raise BadInput(f"--claim takes an accuracy in percent, such as 77.8, not {claim!r}")
    return Claim(percent / 100, "stated with --claim")


def published_claim(book: "Book") -> "Claim | None":
    """The highest number published for this system, data set, votes and l-inf 8/255; None where there is none.

    Only for a model of the preset `paper`: what a smaller network or a shorter training leaves says nothing about it.
    """
    from rush_bench.audit.verdict import Claim
    from rush_bench.report.settle import published_row

    row = published_row(book) if book.labels.get("preset") == "paper" else None
    stated = [] if row is None else [(n, name) for n, name in ((row.pgd, "PGD"), (row.aa, "AA")) if n is not None]
    if row is None or not stated:
        return None
    percent, name = max(stated)
    return Claim(percent / 100, f"{row.method} under {name}, {row.source}; it is about other weights")
