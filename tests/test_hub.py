"""Models and packs to a hub and back: a stand-in that keeps repositories in memory, by huggingface_hub's names."""

import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from rush_bench.cli import main
from rush_bench.errors import BadInput, MissingPackage, RushBenchError
from rush_bench.files import digest, write_json
from rush_bench.hub import place_of, pull, push
from rush_bench.store import read_card, read_weights, save_model

CARD = {"name": "rush-cifar10", "recipe": "rush", "dataset": "cifar10", "votes": [1, 64], "protocol": "NSLF", "seed": 3}
CARD |= {"network": {"name": "tiny", "classes": 4, "channels": 3, "size": 32}, "noise": {"law": "uniform", "scale": 0.3}}
CARD |= {"validation": {"history": [{"stage": "finetune", "epoch": 1, "loss": 1.0, "clean": 0.5, "noisy": 0.25}]}}
MODEL, PACK = "hf://somebody/rush", "hf://datasets/somebody/digits"


class Hub(ModuleType):
    """Repositories by kind and name: files and their bytes. Refuses to write what was not created."""

    def __init__(self) -> None:
        super().__init__("huggingface_hub")
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.HfApi = lambda: self

    def create_repo(self, repo_id: str, *, repo_type: str, exist_ok: bool) -> None:
        self.repositories.setdefault((repo_type, repo_id), {})

    def upload_folder(self, *, repo_id: str, repo_type: str, folder_path: Path, commit_message: str) -> None:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.repositories[repo_type, repo_id] |= files

    def snapshot_download(self, repo_id: str, *, repo_type: str, local_dir: Path, allow_patterns: list[str]) -> str:
        if (repo_type, repo_id) not in self.repositories:
            raise OSError("404 Client Error")
        for name, content in self.repositories[repo_type, repo_id].items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                Path(local_dir).mkdir(exist_ok=True)
                (Path(local_dir) / name).write_bytes(content)
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    made = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Path:
    save_model(tmp_path / "models" / "rush-cifar10", CARD, {"w": torch.arange(6.0)}, {"w": torch.ones(6)})
    (tmp_path / "models" / "rush-cifar10" / "log.jsonl").write_text("{}\n")
    (tmp_path / "models" / "rush-cifar10" / "notes.txt").write_text("private")
    return tmp_path / "models"


def test_a_model_comes_back_as_it_went(hub, store, tmp_path) -> None:
    assert push("rush-cifar10", MODEL, store=store) == MODEL
    files = hub.repositories["model", "somebody/rush"]
    assert set(files) == {"README.md", "card.json", "log.jsonl", "model.safetensors", "best.safetensors"}
    readme = files["README.md"].decode()
    assert readme.startswith("---\n") and "clean 50.0 %, noisy 25.0 %" in readme and "| seed | 3 |" in readme
    path = pull(MODEL, store=tmp_path / "other")
    assert path == tmp_path / "other" / "rush-cifar10"
    for which in ("model", "best"):
        assert torch.equal(read_weights(path.parent, path.name, which)["w"], read_weights(store, path.name, which)["w"])
    assert not (path / "README.md").exists()
    assert pull(MODEL, store=tmp_path / "other") == path  # again: the same model
    assert (path / "card.json").read_bytes() == files["card.json"]
    assert pull(MODEL, store=tmp_path / "other", name="mine").name == "mine"
    assert read_card(tmp_path / "other", "mine") == read_card(store, "rush-cifar10") | {"name": "mine"}


def test_what_is_not_what_its_card_says_never_reaches_the_store(hub, store, tmp_path) -> None:
    push("rush-cifar10", MODEL, store=store)
    files = hub.repositories["model", "somebody/rush"]
    whole = dict(files)
    files["model.safetensors"] += b"\0"
    with pytest.raises(BadInput, match="not those of its card"):
        pull(MODEL, store=tmp_path / "other")
    files |= whole
    card = json.loads(files["card.json"])
    files["card.json"] = json.dumps(card | {"seed": 4}).encode()
    with pytest.raises(BadInput, match="was changed"):
        pull(MODEL, store=tmp_path / "other")
    card |= {"name": "../rush"}
    del card["digest"]
    files["card.json"] = json.dumps(card | {"digest": digest(card)}).encode()
    with pytest.raises(BadInput, match="plain folder name"):
        pull(MODEL, store=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_another_model_of_that_name_is_left_alone(hub, store, tmp_path) -> None:
    push("rush-cifar10", MODEL, store=store)
    save_model(tmp_path / "other" / "rush-cifar10", CARD, {"w": torch.zeros(6)})
    with pytest.raises(BadInput, match="another --name"):
        pull(MODEL, store=tmp_path / "other")


def test_a_damaged_model_is_not_uploaded(hub, store) -> None:
    (store / "rush-cifar10" / "best.safetensors").unlink()
    with pytest.raises(BadInput, match="'best'"):
        push("rush-cifar10", MODEL, store=store)
    assert not hub.repositories


def test_a_pack_comes_back_as_it_went(hub, store, tmp_path) -> None:
    write_json(tmp_path / "digits" / "audit" / "rush.json", {})
    (tmp_path / "digits" / "table.md").write_text("| a table |")
    run = CliRunner().invoke
    assert run(main, ["pack", str(tmp_path / "digits"), "--store", str(store)]).exit_code == 0
    pack = tmp_path / "digits.zip"
    assert run(main, ["push", str(pack), PACK]).exit_code == 0
    files = hub.repositories["dataset", "somebody/digits"]
    assert files["digits.zip"] == pack.read_bytes() and "| a table |" in files["README.md"].decode()
    out = tmp_path / "back" / "d.zip"
    result = run(main, ["pull", PACK, "--out", str(out)])
    assert result.exit_code == 0 and result.stdout == f"{out}\n" and out.read_bytes() == pack.read_bytes()
    with pytest.raises(BadInput, match="no pack"):
        push(str(tmp_path / "digits"), PACK, store=store)
    assert run(main, ["pull", PACK, "--name", "x"]).exit_code == 2


def test_errors_say_what_to_do(hub, store, monkeypatch) -> None:
    with pytest.raises(RushBenchError, match=r"404.*hf auth login"):
        pull("hf://nobody/nothing", store=store)
    for url in ("somebody/rush", "hf://rush", "hf://a/b/c", "https://hub/a/b"):
        with pytest.raises(BadInput, match="hf://user/name"):
            place_of(url)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match="pip install"):
        push("rush-cifar10", MODEL, store=store)
