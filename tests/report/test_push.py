"""Upload to a stand-in of the hub's client: what is sent, and every refusal in one line without the token."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from sparsellm.errors import StorageError
from sparsellm.report.push import push
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

TOKENS = ("hf_" + "x" * 34, "one of another form")


class RefusedError(Exception):
    """An answer of the hub with a status."""

    def __init__(self, status: int) -> None:
        self.response = SimpleNamespace(status_code=status)


class Hub:
    """A stand-in for the client: files by repository and branch, and the status of a refusal by call."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.refuse: dict[str, int] = {}

    def _called(self, name: str) -> None:
        if name in self.refuse:
            raise RuntimeError(f"a file failed with {TOKENS}") from RefusedError(
                self.refuse[name]
            )

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> None:
        self._called("create_repo")
        self.private.setdefault(repo, bool(private))
        self.files.setdefault((repo, "main"), {})

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(private=self.private[repo])

    def create_branch(self, repo: str, *, branch: str, exist_ok: bool) -> None:
        self.files.setdefault((repo, branch), {})

    def upload_folder(
        self, repo_id: str, folder_path: Path, revision: str | None, **patterns: Any
    ) -> Any:
        self._called("upload_folder")
        stored = self.files[repo_id, revision or "main"]
        for name in [
            name
            for name in stored
            if any(fnmatch(name, pattern) for pattern in patterns["delete_patterns"])
        ]:
            del stored[name]
        names = [
            str(file.relative_to(folder_path))
            for file in folder_path.rglob("*")
            if file.is_file()
        ]
        for name in (
            name
            for name in names
            if any(fnmatch(name, pattern) for pattern in patterns["allow_patterns"])
        ):
            stored[name] = (folder_path / name).read_bytes()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny(
        tiny_llama(), tiny_tokenizer(), tmp_path_factory.mktemp("checkpoint") / "p"
    )
    for name in ("README.md", "recipe.yaml", "pruning.json", "LICENSE"):
        (directory / name).write_text("{}")
    return directory


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Hub:
    state = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKENS[1])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda library_name: state)
    return state


def test_the_files_of_the_checkpoint_arrive_and_nothing_else(
    server: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(checkpoint, tmp_path / "p"))
    expected = {file.name: file.read_bytes() for file in directory.iterdir()}
    (directory / ".sparsellm-run").mkdir()
    (directory / ".sparsellm-run" / "run.json").write_text("{}")
    (directory / ".0123.tmp").write_text("half")
    (directory / "notes.md").write_text("mine")
    (directory / "link.json").symlink_to(directory / "config.json")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "short.jinja").write_text("x")
    expected["additional_chat_templates/short.jinja"] = b"x"
    there = [
        "model-00001-of-00002.safetensors",
        "eval/model.safetensors",
        "adapter_config.json",
    ]
    server.files["me/mine", "main"] = dict.fromkeys(there, b"")
    pushed = push(directory, "me/mine")
    assert server.files["me/mine", "main"].pop("eval/model.safetensors") == b""
    assert server.files["me/mine", "main"] == expected
    assert pushed.files == sorted(expected)
    assert pushed.left_out == [".0123.tmp", ".sparsellm-run", "link.json", "notes.md"]
    assert pushed.bytes == sum(map(len, expected.values()))
    assert server.private == {"me/mine": False}
    assert pushed.url == "https://hub/me/mine/commit/0"


def test_a_branch_and_a_private_repository(
    server: Hub, checkpoint: Path, run: Any
) -> None:
    for _ in range(2):  # the second time, both exist
        stdout = run(
            "push",
            checkpoint,
            "me/mine",
            "--private",
            "--revision",
            "half",
            "--json",
            exits=0,
        )[1]
    assert server.private == {"me/mine": True}
    assert "model.safetensors" in server.files["me/mine", "half"]
    assert server.files["me/mine", "main"] == {}
    assert json.loads(stdout)["files"] == sorted(server.files["me/mine", "half"])
    assert (
        "uploaded to https://hub/me/mine/commit/0"
        in run("push", checkpoint, "me/mine", exits=0)[1]
    )


def test_nothing_private_goes_to_a_public_repository(
    server: Hub, checkpoint: Path
) -> None:
    server.private["me/open"] = False
    with pytest.raises(StorageError, match="repository me/open exists and is public"):
        push(checkpoint, "me/open", private=True)
    assert server.files == {("me/open", "main"): {}}


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        ("create_repo", 401, "run `hf auth login`, or set HF_TOKEN"),
        ("upload_folder", 409, "somebody else changed the repository"),
        (
            "upload_folder",
            503,
            "me/mine: RuntimeError: a file failed with ('***', '***'); check the connection",
        ),
    ],
)
def test_a_refusal_has_no_token(
    server: Hub, checkpoint: Path, refusal: Any, call: str, status: int, said: str
) -> None:
    server.refuse[call] = status
    line = refusal("push", checkpoint, "me/mine")
    assert said in line
    assert not any(token in line for token in TOKENS)


@pytest.mark.parametrize("repo", ["mine", "me/mine/more", "../x", "me/", "me/a b"])
def test_a_name_that_is_no_repository(checkpoint: Path, repo: str) -> None:
    with pytest.raises(StorageError, match="is not a name of the hub; give owner/name"):
        push(checkpoint, repo)


def test_a_directory_that_is_no_checkpoint(
    server: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").symlink_to(checkpoint / "model.safetensors")
    with pytest.raises(StorageError, match=r"has no config\.json with weights"):
        push(tmp_path, "me/mine")
    assert not server.files
