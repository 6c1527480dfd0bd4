"""--precision auto: bfloat16 where the device computes in it, one choice for all who share a results folder."""

import pytest
import torch

from rush_bench.devices import has_bfloat16
from rush_bench.errors import BadInput
from rush_bench.evaluation.precision import choose_precision, keep_precision

pytestmark = pytest.mark.strangers

CPU = torch.device("cpu")


@pytest.fixture
def native(monkeypatch):
    """`native(True)`: from here on the processor has bfloat16."""

    def say(has):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return say


@pytest.mark.parametrize("first", [True, False])
def test_the_choice_is_made_once_for_a_folder(tmp_path, native, first):
    wanted = "bfloat16" if first else "float32"
    native(first)
    assert has_bfloat16(CPU) == first
    assert choose_precision("auto", CPU, tmp_path / "out") == wanted
    assert not (tmp_path / "out").exists()
    keep_precision("auto", wanted, tmp_path / "out")
    native(not first)  # another node with a shard of the same work
    assert choose_precision("auto", CPU, tmp_path / "out") == wanted
    assert choose_precision("auto", CPU, tmp_path / "another") != wanted
    with pytest.raises(BadInput, match=f"has begun .* in {wanted}; the same command again"):  # both began at once
        keep_precision("auto", "float32" if first else "bfloat16", tmp_path / "out")


def test_what_is_asked_for_is_done_and_leaves_nothing(tmp_path, native):
    native(True)
    assert choose_precision("float32", CPU, tmp_path / "out") == "float32"
    keep_precision("float32", "float32", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_from_before_the_choice_was_kept_go_on_in_float32(tmp_path, native):
    native(True)
    (tmp_path / "runs").mkdir()
    assert choose_precision("auto", CPU, tmp_path) == "float32"


def test_a_choice_that_is_damaged_is_told(tmp_path):
    (tmp_path / "precision.json").write_text('{"auto": "float8"}')
    with pytest.raises(BadInput, match=r"precision\.json is damaged"):
        choose_precision("auto", CPU, tmp_path)
