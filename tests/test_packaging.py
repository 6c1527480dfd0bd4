"""The files that build the environment agree with each other and name no address."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def names(lines: list[str]) -> set[str]:
    return {re.split(r"[ <>=!~;\[]", line, maxsplit=1)[0] for line in lines if line and not line.startswith("#")}


def test_every_direct_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = names(project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert wanted <= names(lines)
    assert all(line == "" or re.fullmatch(r"#.*|[a-z0-9-]+==[\d.]+", line) for line in lines)


def test_torch_and_torchvision_match() -> None:
    pinned = dict(re.findall(r"^(\w+)==2?0?\.(\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert int(pinned["torchvision"]) == int(pinned["torch"]) + 15


def test_no_address_in_what_builds_the_environment() -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "://" not in text and "index-url" not in text and "find-links" not in text, name
