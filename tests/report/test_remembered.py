"""A table of records that have not changed reads none of them, and of any that have changed reads them anew."""

import os
import zipfile

import pandas as pd
import pytest

from rush_bench.errors import BadInput
from rush_bench.records import index
from rush_bench.records import results as records
from rush_bench.report import tables


@pytest.fixture
def settled(lab, monkeypatch):
    """Two finished cells and an unfinished one, in a table already; files of this very moment count as settled."""
    monkeypatch.setattr(index, "RECENT", -60.0)
    lab.cell("rush@1", "clean", [9] * 12, repeats=10, votes=1)
    lab.cell("rush@1", "pgd", [4] * 12, repeats=10, votes=1)
    lab.cell("rush@1", "eot", [4] * 12, repeats=10, votes=1, chunks_done=1)
    lab.table = lambda: tables.table(lab.results())
    lab.before = lab.table()
    return lab


def chunk_of(lab, attack):
    return next(r.folder for r in lab.results() if r.labels["attack"] == attack) / "chunk-0000.npz"


@pytest.fixture
def unread(monkeypatch):
    """From here on no chunk can be read."""
    return lambda: monkeypatch.setattr(records, "read_chunk", lambda *_: pytest.fail("a chunk was read"))


def test_nothing_is_read_twice(settled, unread):
    unread()
    pd.testing.assert_frame_equal(settled.table(), settled.before)


def test_a_byte_that_changed_is_found_even_if_its_time_is_set_back(settled):
    path = chunk_of(settled, "pgd")
    stat, content = path.stat(), bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        content[file.getinfo("correct.npy").header_offset + 100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(BadInput, match="damaged"):
        settled.table()


def test_a_chunk_of_another_cell_is_found(settled):
    chunk_of(settled, "clean").replace(chunk_of(settled, "pgd"))
    with pytest.raises(BadInput, match="copied from elsewhere"):
        settled.table()


def test_a_chunk_more_or_less_is_found(settled):
    chunk_of(settled, "pgd").unlink()
    settled.cell("rush@1", "eot", [4] * 12, repeats=10, votes=1)
    (row,) = settled.table().to_dict("records")
    assert pd.isna(row["pgd"]) and row["eot"] == pytest.approx(40.0)


def test_labels_that_changed_are_found(settled, capsys):
    path = chunk_of(settled, "pgd").with_name("cell.json")
    path.write_text(path.read_text().replace('"rush@1"', '"rush@2"'))
    settled.table()
    assert "labels that were changed" in capsys.readouterr().err


def test_cells_of_other_images_do_not_meet_in_a_table_from_memory(settled, unread):
    """One is remembered, the other was remembered in another folder."""
    path = settled.folder / "runs" / ".index.json"
    (result,) = (r for r in settled.results() if r.labels["attack"] == "pgd")
    (made,) = (v for k, v in result.index.now[result.folder.name]["made"].items() if "summary" in k)
    made[1] = "of other images"
    result.index.changed = True
    result.index.save()
    assert path.exists()
    unread()
    with pytest.raises(BadInput, match="other images or labels"):
        settled.table()


@pytest.mark.parametrize("how", ["other code", "damage", "recent files", "no file"])
def test_what_may_not_hold_is_read_again(settled, monkeypatch, how):
    path, read = settled.folder / "runs" / ".index.json", []
    if how == "other code":
        monkeypatch.setattr(index, "_code", lambda: "another")
    elif how == "damage":
        path.write_text(path.read_text().replace("0.4", "0.9"))
    elif how == "recent files":
        path.unlink()
        monkeypatch.setattr(index, "RECENT", 2.0)
        settled.table()
        settled.table()
    else:
        path.unlink()
    real = records.read_chunk
    monkeypatch.setattr(records, "read_chunk", lambda *rest: read.append(rest) or real(*rest))
    pd.testing.assert_frame_equal(settled.table(), settled.before)
    assert len(read) == 4


def test_a_folder_that_cannot_be_written_has_a_table(settled, monkeypatch):
    (settled.folder / "runs" / ".index.json").unlink()

    def full(path, text):
        raise index.RushBenchError("no space")

    monkeypatch.setattr(index, "write_text", full)
    pd.testing.assert_frame_equal(settled.table(), settled.before)
