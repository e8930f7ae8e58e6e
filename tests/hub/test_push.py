"""Upload to a stand-in of the hub: what is sent, and every refusal in one line without the token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from sparsellm.errors import StorageError
from sparsellm.hub.push import push_checkpoint
from tests.hub.stand_in import TOKEN, Hub, hub
from tests.models import save_tiny, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path_factory.mktemp("checkpoint") / "p")
    for name in ("README.md", "recipe.yaml", "pruning.json", "LICENSE"):
        (directory / name).write_text("{}")
    return directory


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that the hub's client talks to, with a token."""
    with hub() as state:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", state.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks git-lfs
        huggingface_hub.utils.disable_progress_bars()  # as the command line does before the client is imported
        yield state
        huggingface_hub.utils.enable_progress_bars()


def test_the_files_of_the_checkpoint_arrive_and_nothing_else(server: Hub, checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "p"
    directory.mkdir()
    for file in checkpoint.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    wanted = {file.name: file.read_bytes() for file in directory.iterdir()}
    (directory / ".sparsellm-run").mkdir()
    (directory / ".sparsellm-run" / "run.json").write_text("{}")
    (directory / ".0123.tmp").write_text("half")
    (directory / "notes.md").write_text("mine")
    (directory / "link.json").symlink_to(directory / "config.json")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "short.jinja").write_text("x")
    wanted["additional_chat_templates/short.jinja"] = b"x"
    pushed = push_checkpoint(directory, "me/mine")
    assert server.files["me/mine", "main"] == wanted
    assert pushed.files == sorted(wanted)
    assert pushed.left_out == [".0123.tmp", ".sparsellm-run", "link.json", "notes.md"]
    assert pushed.bytes == sum(map(len, wanted.values()))
    assert server.private == {"me/mine": False}
    assert pushed.url.startswith(f"{server.address}/me/mine/commit/")


def test_a_branch_and_a_private_repository(server: Hub, checkpoint: Path, run: Any) -> None:
    for _ in range(2):  # the second time, both exist
        code, stdout, stderr = run("push", checkpoint, "me/mine", "--private", "--revision", "half", "--json")
        assert code == 0, stderr
    assert server.private == {"me/mine": True}
    assert "model.safetensors" in server.files["me/mine", "half"]
    assert server.files["me/mine", "main"] == {}
    assert json.loads(stdout)["files"] == sorted(server.files["me/mine", "half"])
    code, stdout, _ = run("push", checkpoint, "me/mine")
    assert code == 0
    assert f"uploaded to {server.address}/me/mine/commit" in stdout
    assert TOKEN not in stdout


def test_nothing_private_goes_to_a_public_repository(server: Hub, checkpoint: Path, run: Any) -> None:
    server.private["me/open"] = False
    code, _, stderr = run("push", checkpoint, "me/open", "--private")
    assert code == 2
    assert "repository me/open exists and is public" in stderr
    assert not any("commit" in call or "preupload" in call for call in server.calls)


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        ("repos/create", 401, "run `hf auth login`, or set HF_TOKEN (HTTP 401)"),
        ("repos/create", 403, "may not write there"),
        ("preupload", 404, "no such repository or branch"),
        ("commit", 409, "somebody else changed the repository"),
        ("commit", 400, "refuses what was sent"),
        ("commit", 418, "cannot upload to me/mine: HfHubHTTPError"),
        ("lfs/blob", 413, "too large"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(
    server: Hub, checkpoint: Path, run: Any, call: str, status: int, said: str
) -> None:
    server.refuse[call] = status  # with an answer that repeats the token
    code, stdout, stderr = run("push", checkpoint, "me/mine")
    assert (code, stdout) == (2, "")
    assert said in stderr
    assert stderr.strip().count("\n") == 0
    assert TOKEN not in stderr
    assert "Traceback" not in stderr


def test_without_a_hub_or_a_right_token(
    server: Hub, checkpoint: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, stderr = run("push", checkpoint, "me/mine")
    assert (code, "hf_wrong" in stderr) == (2, False)
    assert "knows no such token" in stderr
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    code, _, stderr = run("push", checkpoint, "me/mine")
    assert (code, stderr.strip().count("\n")) == (2, 0)
    assert "cannot upload to me/mine: ConnectError" in stderr
    assert stderr.endswith("; check the connection and HF_ENDPOINT\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, stderr = run("push", checkpoint, "me/mine")
    assert (code, stderr.strip().count("\n")) == (2, 0)
    assert "OfflineModeIsEnabled" in stderr


@pytest.mark.parametrize("repo", ["mine", "me/mine/more", "../x", "me/", "", "me/a b"])
def test_a_name_that_is_no_repository(checkpoint: Path, repo: str) -> None:
    with pytest.raises(StorageError, match="is not a name of the hub; give owner/name"):
        push_checkpoint(checkpoint, repo)


def test_a_directory_that_is_no_checkpoint(tmp_path: Path, run: Any) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        code, _, stderr = run("push", place, "me/mine")
        assert code == 2
        assert f"{place} has no config.json with weights" in stderr
