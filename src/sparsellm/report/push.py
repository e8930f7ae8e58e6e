"""Upload of a checkpoint to the Hugging Face hub, through its own client."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from sparsellm.arguments import Checkpoint, Name, checked
from sparsellm.errors import StorageError, one_line
from sparsellm.files.contents import LIST, WEIGHTS, checkpoint_files
from sparsellm.inputs import HUB_ID

# If an earlier upload left one of these, readers would take it for a part of the new checkpoint.
_REPLACED = [
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.*",
]
_REPLACED += [
    LIST,
    "results.json",
    "pruning.json",
    "packed.json",
    "recipe.yaml",
    "report.html",
    "adapter_config.json",
]
_TOKEN = re.compile(r"hf_\w+|Bearer \S+")
_ADVICE = {
    401: "run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; give it the right to, or name a repository of yours",
    404: "the hub has no such repository or branch, or does not show it to this token",
    409: "somebody else changed the repository in the meantime; run the same command again",
}


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    url: str  # that of the commit, or of the repository if nothing had changed
    files: list[str]
    left_out: list[str]  # names in the directory that are not part of the checkpoint
    bytes: int


@checked
def push(
    directory: Checkpoint,
    repo: Name,
    *,
    private: bool = False,
    revision: Name | None = None,
) -> Pushed:
    """Uploads a checkpoint to the Hugging Face hub, with the token that the hub's client finds. Files that are not part
    of the checkpoint are left out. Weights that the repository has are replaced.

    Args:
        repo: ``owner/name``; created if the hub has none.
        private: create a private repository; an existing public one is refused.
        revision: the branch, created if there is none; None for the main one.

    Raises:
        StorageError: directory or name do not fit, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, get_token

    directory = Path(directory).expanduser()
    if not HUB_ID.fullmatch(repo):
        raise StorageError(
            f"repository {repo!r:.120} is not a name of the hub; give owner/name"
        )
    if not directory.is_dir():
        raise StorageError(
            f"{directory} is not a directory; give the directory of a checkpoint"
        )
    try:
        files, left_out = checkpoint_files(directory)
        if "config.json" not in files or not any(map(WEIGHTS.fullmatch, files)):
            raise StorageError(
                f"{directory} has no config.json with weights to upload; links are left out, and, where there is "
                f"a {LIST}, files that it does not name; give the directory of a checkpoint"
            )
        api = HfApi(library_name="sparsellm")
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise StorageError(
                f"repository {repo} exists and is public; make it private there, or leave out --private"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=_REPLACED,
            commit_message="Upload a checkpoint pruned by sparsellm",
        )
    except StorageError:
        raise
    except (
        Exception
    ) as error:  # the client raises httpx's, requests', the system's and its own errors
        cause: BaseException | None = error
        while cause is not None and not hasattr(
            cause, "response"
        ):  # the client wraps what happens to one file
            cause = cause.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        invalid = "README.md" in str(error) and isinstance(
            error, ValueError
        )  # the client checks its front matter
        other = (
            "correct the front matter of README.md"
            if invalid
            else "check the connection and HF_ENDPOINT"
        )
        advice = _ADVICE.get(status or 0, other)
        said = _TOKEN.sub("***", one_line(error).replace(get_token() or "\0", "***"))
        raise StorageError(f"cannot upload to {repo}: {said}; {advice}") from None
    size = sum((directory / name).stat().st_size for name in files)
    return Pushed(
        str(getattr(commit, "commit_url", "") or commit), files, left_out, size
    )
