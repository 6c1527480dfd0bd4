"""`rush-bench corruptions`: one call of `rush_bench.corruptions`."""

from typing import Any

import click

from rush_bench.cli import common, complete


@click.command()
@click.argument("patterns", metavar="MODELS", shell_complete=complete.models)
@click.option("--dataset", default="cifar10", show_default=True, help="cifar10 or cifar100: CIFAR-10-C or CIFAR-100-C.")
@click.option("--set15/--all19", "usual", default=True, help="The 15 usual corruptions, or all 19.  [default: set15]")
@click.option("--reference", metavar="MODEL", help="Reference model of mCE; without it, mCE is a dash.")
@click.option("--n", "count", help="Images of each corruption and severity, or `all`.  [default: 1000]")
@click.option("--repeats", type=click.IntRange(min=1), help="Predictions K per image and cell.  [default: by votes]")
@click.option(
    "--chunk", type=click.IntRange(min=1), default=500, show_default=True, help="Images per chunk, which is stored as one file."
)
@common.shard
@common.folder_option("--out", "results", "Results folder; records and table go to corruptions/ in it.")
@common.store
@common.data_dir
@common.seed
@common.device
@common.memory
@common.max_minutes
@common.as_json
def command(shard: str, as_json: bool, **asked: Any) -> None:
    """Score models of the store (MODELS: all, or rush@64,'acl*') under common corruptions, at five severities each.

    \b
    rush-bench corruptions all --dataset cifar10 --reference pgd_at-cifar10

    The files of CIFAR-10-C and CIFAR-100-C are not downloaded; the message for a missing file says where they are.
    Running the same command again, from any number of processes, finishes the work.
    """
    with common.quiet_stdout():
        from rush_bench.api.corruptions import corruptions
        from rush_bench.evaluation.work import parse_shard

        given = {key: asked[key] for key in ("reference", "out", "seed", "repeats", "chunk", "max_minutes")}
        given |= dict(common.by_name(asked)) | {"which": "set15" if asked["usual"] else "all19", "shard": parse_shard(shard)}
        run = corruptions(asked["patterns"], asked["dataset"], **given)
        for path in run.paths:
            click.echo(f"wrote {path}", err=True)
    if as_json:
        rows = common.records(run.table().frame)
        common.print_json({"complete": run.complete, "failed": run.failed, "reference": run.reference, "table": rows})
    else:
        common.print_rich(run.table())
    common.finish(run, shard)
