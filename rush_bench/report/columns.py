"""The columns of measured accuracies in tables and figures: one row each, and none for an attack that nobody foresaw.

An attack of a plug-in, or any registered one that no row names, has a column of its own name where it was measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass

MEASURED = "measured_"  # begins the names in the paper style, where what is published stands beside


@dataclass(frozen=True)
class Column:
    """One accuracy: of the estimate `of` (None: its own name), as `header` in tables.

    `paper` is its place in the paper style, where it goes by `named` (None: its own name); `plain`: whether the plain style has
    it. `derived` from an attack's record: no attack of its own. `always`: the styles that show it empty too. `wide`: no room
    for it on a terminal in the paper style. `weak`: runs with fewer steps in a quick suite, which the paper style marks.
    `panel`: its title in the figure of accuracy against eps (None: no panel).
    """

    name: str
    header: str
    of: str | None = None
    plain: bool = True
    derived: bool = False
    paper: int | None = None
    named: str | None = None
    always: tuple[str, ...] = ()
    wide: bool = False
    weak: bool = False
    panel: str | None = None

    @property
    def estimate(self) -> str:
        """The estimate of a row that it shows."""
        return self.of or self.name

    @property
    def in_paper(self) -> str:
        """Its name in the paper style."""
        return MEASURED + (self.named or self.name)


BOTH = ("plain", "paper")
# In the order of the plain style.
COLUMNS = (
    Column("clean", "Clean", paper=0, named="standard", always=BOTH),
    Column("pgd", "PGD", paper=1, always=BOTH, weak=True, panel="PGD"),
    Column("eot", "EOT", paper=6, always=("paper",), weak=True, panel="EOT-PGD"),
    Column("apgd", "APGD (quick)", paper=3, panel="APGD (quick stand-in for AA)"),
    Column("aa", "AA", paper=2, always=("paper",), panel="AutoAttack"),
    Column("square", "Square on the rest", paper=7, weak=True),
    Column("worst", "Worst", paper=9, always=BOTH, weak=True, panel="Worst case of the suite"),
    Column("worst_any10", "Worst, any of 10", derived=True),
    Column("apgd_bank", "APGD on bank (quick)", derived=True),
    Column("aa_bank", "AA on bank", derived=True, paper=4, always=("paper",), wide=True),
    Column("aa_fresh", "AA on fresh draws", of="aa", plain=False, derived=True, paper=5, always=("paper",), wide=True),
)
OTHERS = 8  # the place in the paper style of attacks that no row above names: before the worst case
BY_NAME = {column.name: column for column in COLUMNS}


def plain(measured: Iterable[str]) -> list[Column]:
    """The columns of the plain style where these estimates were measured, in order."""
    known = [column for column in COLUMNS if column.plain]
    place = known.index(BY_NAME["worst"])
    return [*known[:place], *_others(measured), *known[place:]]


def paper(measured: Iterable[str]) -> list[Column]:
    """The columns of the paper style where these estimates were measured, in order."""
    known = [column for column in COLUMNS if column.paper is not None]
    return sorted([*known, *_others(measured)], key=lambda column: column.paper or 0)


def named(name: str) -> Column | None:
    """The column of this name, in either style; None for one that no row above names."""
    return BY_NAME.get(name) or next((column for column in COLUMNS if column.in_paper == name), None)


def estimate_of(name: str) -> str:
    """The estimate that a column of either style shows: `measured_standard` is `clean`."""
    column = named(name)
    return column.estimate if column else name.removeprefix(MEASURED)


def header_of(name: str) -> str:
    """What tables call a column of either style."""
    column = named(name) or _other(name.removeprefix(MEASURED))
    return column.named.capitalize() if column.named and name == column.in_paper else column.header


def _others(measured: Iterable[str]) -> list[Column]:
    """Columns for estimates that no row above names, in alphabetical order."""
    return [_other(name) for name in sorted(set(measured) - BY_NAME.keys())]


def _other(name: str) -> Column:
    return Column(name, name.replace("_bank", " on bank"), derived=name.endswith("_bank"), paper=OTHERS)
