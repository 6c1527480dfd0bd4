"""Every public name has a docstring whose example does what it says."""

import doctest
import inspect
from pathlib import Path

import pytest

import rush_bench as rb
from tests.api.conftest import QUICK

FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.mark.parametrize("name", rb.__all__)
def test_the_example_of_a_public_name(name: str, tmp_path: Path, measured: Path, store: Path) -> None:
    text = inspect.getdoc(getattr(rb, name))
    assert text is not None and "Examples:" in text
    given = {"folder": tmp_path, "measured": measured, "store": store, "quick": QUICK}
    found = doctest.DocTestParser().get_doctest(text, given, name, None, None)
    assert found.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(found, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", [name for name in rb.__all__ if inspect.isfunction(getattr(rb, name))])
def test_a_docstring_names_every_parameter(name: str) -> None:
    function = getattr(rb, name)
    text = inspect.getdoc(function) or ""
    missing = [one for one in inspect.signature(function).parameters if one.rstrip("_") not in text]
    assert not missing
