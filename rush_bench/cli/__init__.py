"""The command line. The group is in `group.py`: here, importing `rush_bench.cli.list` would hide the builtin of that name."""

from rush_bench.cli.group import main as main
