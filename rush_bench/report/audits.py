"""Audits as text: the table of findings, the verdict in a sentence, and both as files."""

import json
from pathlib import Path

from rush_bench.audits.run import FOLDER, Audit
from rush_bench.audits.verdict import BUGS, PREMISES, STRENGTH
from rush_bench.files import write_text
from rush_bench.report.settle import markdown, stem


def lay_out(audit: Audit, sources: bool = True) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the findings, as text; without `sources` what a terminal has room for."""
    rows = []
    for f in audit.findings:
        kinds = {"bug": BUGS, "premise": PREMISES, "strength": STRENGTH}
        decides = "bug" if f.status == "bug" else next((kind for kind, names in kinds.items() if f.check in names), "sign")
        needed = "" if f.threshold is None else f"{f.relation} {f.threshold:.4g}"
        figure = "" if f.figure is None else f"{f.figure:.4g}"
        if f.low is not None and f.high is not None:
            figure += f" [{f.low:.3g}, {f.high:.3g}]"
        rows.append([f.check, f.status.upper() if f.status in ("flag", "bug") else f.status, figure, needed, decides, f.what])
        rows[-1] += ["; ".join(text for text in (f.source, f.note) if text)] if sources else []
    header = ["Check", "Outcome", "Figure", "Passes if", "Weighs as", "What"]
    return [*header, "Source and notes"] if sources else header, rows


def sentence(audit: Audit) -> str:
    """The verdict in one line."""
    name, labels = audit.evidence.subject, audit.evidence.labels
    if audit.verdict is None:
        return f"{name}: no verdict yet, experiments or probes are missing; run the same command again"
    v = audit.verdict
    worst = f"{100 * v.worst.value:.1f} % [{100 * v.worst.low:.1f}, {100 * v.worst.high:.1f}]"
    return (
        f"{name} on {labels.get('dataset')} at {labels['norm']} {labels['eps']:.4g}, n={labels.get('n')}: the claim of "
        f"{100 * v.claim.value:.1f} % ({v.claim.source}) {_verb(v.word)}. Worst case {worst}. Rule {v.rule}: {v.reason}. "
        f"Decided by: {', '.join(v.decided_by) or 'the claim itself'}."
    )


def _verb(word: str) -> str:
    words = {"stands": "STANDS", "weakened": "IS WEAKENED", "refuted": "IS REFUTED"}
    return words.get(word, f"CANNOT BE SETTLED ({word})")


def write(audit: Audit, folder: Path) -> list[Path]:
    """The audit under `<folder>/audit` as JSON and Markdown; returns the paths."""
    json_path, text_path = (Path(folder) / FOLDER / f"{stem(audit.evidence)}{kind}" for kind in (".json", ".md"))
    write_text(json_path, json.dumps(audit.to_dict(), indent=2, default=str) + "\n")
    table = markdown(*lay_out(audit))
    write_text(text_path, f"# {audit.evidence.subject}\n\n{sentence(audit)}\n\n{table}\nRules: `rush-bench docs verdict`.\n")
    return [json_path, text_path]
