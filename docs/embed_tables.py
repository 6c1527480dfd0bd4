"""Copy tables from results/ into the pages that show them, between `<!-- table: FILE -->` and `<!-- end -->`."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/rush-claim.md")
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def embedded(text: str, root: Path = ROOT) -> str:
    """The text with every block's table as its file has it now."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{(root / found[2]).read_text(encoding='utf-8').strip()}\n\n{found[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        (ROOT / page).write_text(embedded(text), encoding="utf-8")
