"""Finds the checkpoint directory of a model that a user names: a directory, hub id, ``.gguf`` file, or ``demo``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from sparsellm.errors import ModelError, one_line
from sparsellm.files.demo_model import demo_gguf
from sparsellm.files.gguf import gguf_checkpoint
from sparsellm.files.named import (
    GIVE,
    check_name,
    hub_reason,
    is_gguf,
    not_found,
    remember,
)
from sparsepack.checkpoint import adapter_in

_HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.py",
]
_HUB_FILES += [
    "LICEN[CS]E*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
    "bpe.codes",
    "README.md",
]
_CONFIG = ["config.json", "*.py"]
_COPIES = ["consolidated*", "*/*.safetensors"]  # the weights in other forms


def checkpoint_directory(
    model: str,
    argument: str = "model",
    check: Callable[[Path], object] | None = None,
    *,
    dtype: str = "auto",
) -> Path:
    """The directory of a checkpoint, which is downloaded or converted first if needed. A ModelError, which calls the
    model by the name of its ``argument``, says that there is none, or that it cannot be fetched. ``check`` is called
    with the directory of its config before weights are downloaded; ``dtype`` is that of ``gguf_checkpoint``."""
    if model == "demo":
        return remember(gguf_checkpoint(demo_gguf(), dtype), model)
    check_name(model, argument)
    try:
        path = Path(model).expanduser()
        path.lstat()
    except FileNotFoundError:
        pass  # it may be a hub id
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long, a NUL character, an unknown user after the ~
        raise ModelError(
            f"{argument} {model!r:.100} cannot be looked up: {one_line(error)}"
        ) from None
    if is_gguf(path) and not path.is_dir():
        if not path.is_file():
            raise ModelError(
                f"{argument} {model} is not a file; give the path of a .gguf file"
            )
        return remember(gguf_checkpoint(path, dtype), model)
    if path.is_dir():
        if adapter := adapter_in(path):
            raise ModelError(f"{argument} {adapter}")
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{argument} {model} has no config.json; give a directory saved by save_pretrained"
            )
        return path
    if path.exists():
        raise ModelError(f"{argument} {model} is a file; {GIVE}")
    if check is not None:
        check(_from_hub(model, argument, _CONFIG))
    return _from_hub(model, argument)


def config_place(model: str, dtype: str = "auto") -> Path:
    """A directory with the config of a model, or its config file, to plan with. As ``checkpoint_directory``, but for a
    hub id only the config is downloaded."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # it cannot be a path
        path = Path(model).expanduser()
        if path.suffix == ".json" and path.is_file():
            return path
        if not path.exists() and model != "demo" and not is_gguf(path):
            check_name(model)
            return _from_hub(model, "model", _CONFIG)
    return checkpoint_directory(model, dtype=dtype)


def _from_hub(model: str, argument: str, files: list[str] = _HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download

    try:
        place = snapshot_download(model, allow_patterns=files, ignore_patterns=_COPIES)
    except Exception as error:  # the client raises requests', httpx's and its own
        raise not_found(model, argument, hub_reason(error)) from None
    remember(Path(place), model)
    return checkpoint_directory(place, argument)
