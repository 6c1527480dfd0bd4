"""`rush-bench corruptions`: accuracy of stored models on CIFAR-10-C or CIFAR-100-C, and mCE."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rush_bench.cli import common
from rush_bench.cli.attack import check_count
from rush_bench.errors import BadInput

if TYPE_CHECKING:
    from rush_bench.datasets.corruptions import CorruptedImages
    from rush_bench.defenses import Defense

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
def command(shard: str, out: Path, max_minutes: float | None, as_json: bool, **asked: Any) -> None:
    """Score models of the store (MODELS: all, or rush@64,'acl*') under common corruptions, at five severities each.

    \b
    rush-bench corruptions all --dataset cifar10 --reference pgd_at-cifar10

    The files of CIFAR-10-C and CIFAR-100-C are not downloaded; the message of a missing one says where they are.
    Running the same command again, from any number of processes, finishes the work.
    """
    check_count(asked["count"])
    with common.quiet_stdout():
        from rush_bench.evaluation import corruptions
        from rush_bench.evaluation.work import parse_shard
        from rush_bench.report import corruptions as report

        part = parse_shard(shard)
        defenses, data, reference = asked_for(asked)
        how: dict[str, Any] = {key: asked[key] for key in ("seed", "repeats", "chunk")}
        run = corruptions.evaluate(defenses, data, out=out, shard=part, max_minutes=max_minutes, **how)
        frame = report.table(run.results, reference)
        if any(result.complete for result in run.results):
            name = f"{asked['dataset']}-{'set15' if asked['usual'] else 'all19'}"
            for path in report.write(frame, out / corruptions.FOLDER / name):
                click.echo(f"wrote {path}", err=True)
    if as_json:
        rows = json.loads(frame.to_json(orient="records"))
        common.print_json({"complete": run.complete, "failed": run.failed, "reference": reference, "table": rows})
    else:
        common.print_rows(report.caption(frame), *report.lay_out(frame))
    common.finish(run, shard)


def asked_for(asked: dict[str, Any]) -> tuple["list[Defense]", "CorruptedImages", str | None]:
    """The defences, the corrupted images, and the name of the model that mCE is relative to, if any."""
    from rush_bench.datasets.corruptions import ALL, USUAL, load_corrupted
    from rush_bench.defenses import load_defense
    from rush_bench.defenses.load import resolve
    from rush_bench.devices import choose_device

    dataset, reference, store = asked["dataset"], asked["reference"], asked["store"]
    which: dict[str, Any] = {"seed": asked["seed"], "data_dir": asked["data_dir"]}
    chosen = USUAL if asked["usual"] else ALL
    data = load_corrupted(dataset, chosen, **which)
    if asked["count"] != "all":
        wanted = int(asked["count"]) if asked["count"] else min(DEFAULT_N, len(data))
        data = load_corrupted(dataset, chosen, wanted, **which)
    names = resolve([p.strip() for p in asked["patterns"].split(",") if p.strip()], store, dataset)
    if reference is not None:
        found = resolve([reference], store, dataset)
        if len(found) > 1:
            raise BadInput(f"--reference {reference} is more than one model: {', '.join(found)}; name one of them")
        reference = found[0]
        names = list(dict.fromkeys([*names, reference]))
    options: dict[str, Any] = {"device": choose_device(asked["device"]), "memory": int(asked["memory"] * 2**30)}
    return [load_defense(name, store=store, **options) for name in names], data, reference
