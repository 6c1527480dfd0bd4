"""One file per system: its objective and its settings, with the paper's equation numbers beside the lines.

A recipe module has a literal `NAMES = {"name": "one line"}` and `make(name) -> Recipe`. A plug-in registers a
`Recipe` under the entry point group `rush_bench.recipes`.
"""
