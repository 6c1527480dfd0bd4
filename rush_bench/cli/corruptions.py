"""`rush-bench corruptions`: accuracy of stored models on CIFAR-10-C or CIFAR-100-C, and mCE."""

import json
from pathlib import Path
from typing import Any

import click

from rush_bench.cli import common
from rush_bench.cli.attack import check_count
from rush_bench.errors import BadInput

DEFAULT_N = 1000


@click.command()
@click.argument("patterns", metavar="MODELS")
@click.option("--dataset", default="cifar10", show_default=True, help="cifar10 or cifar100, whose corruptions to take.")
@click.option("--set15/--all19", "usual", default=True, help="The 15 usual corruptions, or all 19.  [default: set15]")
@click.option("--reference", metavar="MODEL", help="Model that mCE is relative to; without it mCE is a dash.")
@click.option("--n", "count", help=f"Images of each corruption and severity, or `all`.  [default: {DEFAULT_N}]")
@click.option("--repeats", type=click.IntRange(min=1), help="Predictions K per image and cell.  [default: by votes]")
@click.option("--chunk", type=click.IntRange(min=1), default=500, show_default=True, help="Images kept as one file.")
@common.shard
@common.folder_option("--out", "results", "Results folder; records and table go to corruptions/ in it.")
@common.store
@common.data_dir
@common.seed
@common.device
@click.option("--memory", type=click.FloatRange(min=0.01), default=2.0, show_default=True, help="GiB a pass may use.")
@common.max_minutes
@common.as_json
def command(
    patterns: str,
    dataset: str,
    usual: bool,
    reference: str | None,
    count: str | None,
    repeats: int | None,
    chunk: int,
    shard: str,
    out: Path,
    store: Path,
    data_dir: Path | None,
    seed: int,
    device: str,
    memory: float,
    max_minutes: float | None,
    as_json: bool,
) -> None:
    """Score models of the store (MODELS: all, or rush@64,'acl*') under common corruptions, at five severities each.

    \b
    rush-bench corruptions all --dataset cifar10 --reference pgd_at-cifar10

    The files of CIFAR-10-C and CIFAR-100-C are not downloaded; the message of a missing one says where they are.
    Running the same command again, from any number of processes, finishes the work.
    """
    check_count(count)
    with common.quiet_stdout():
        from rush_bench.datasets.corruptions import ALL, USUAL, load_corrupted
        from rush_bench.defenses import load_defense
        from rush_bench.defenses.load import resolve
        from rush_bench.devices import choose_device
        from rush_bench.evaluation import corruptions
        from rush_bench.evaluation.work import parse_shard
        from rush_bench.report import corruptions as report

        part = parse_shard(shard)
        chosen = USUAL if usual else ALL
        data = load_corrupted(dataset, chosen, seed=seed, data_dir=data_dir)
        if count != "all":
            wanted = int(count) if count else min(DEFAULT_N, len(data))
            data = load_corrupted(dataset, chosen, wanted, seed=seed, data_dir=data_dir)
        names = resolve([p.strip() for p in patterns.split(",") if p.strip()], store, dataset)
        if reference is not None:
            found = resolve([reference], store, dataset)
            if len(found) > 1:
                raise BadInput(f"--reference {reference} is more than one model: {', '.join(found)}; name one of them")
            reference = found[0]
            names = list(dict.fromkeys([*names, reference]))
        options: dict[str, Any] = {"device": choose_device(device), "memory": int(memory * 2**30)}
        defenses = [load_defense(name, store=store, **options) for name in names]
        run = corruptions.evaluate(
            defenses, data, out=out, seed=seed, repeats=repeats, chunk=chunk, shard=part, max_minutes=max_minutes
        )
        frame = report.table(run.results, reference)
        if any(result.complete for result in run.results):
            for path in report.write(frame, out / corruptions.FOLDER / f"{dataset}-{'set15' if usual else 'all19'}"):
                click.echo(f"wrote {path}", err=True)
    if as_json:
        rows = json.loads(frame.to_json(orient="records"))
        common.print_json({"complete": run.complete, "failed": run.failed, "reference": reference, "table": rows})
    else:
        common.print_rows(report.caption(frame), *report.lay_out(frame))
    common.finish(run, shard)
