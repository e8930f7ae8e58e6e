"""Loads a checkpoint, packed or dense, into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsepack.arguments import checked
from sparsepack.checkpoint import adapter_in, read_config, read_object
from sparsepack.decode import decodes
from sparsepack.errors import FormatError, PackError, SettingError, shown
from sparsepack.module import PackedLinear, activations_of, gather

INDEX = "model.safetensors.index.json"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@checked
def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    activations: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model from a directory that ``sparsellm pack`` wrote; its linears stay packed in memory.

    ``AutoModelForCausalLM.from_pretrained`` returns the same after ``import sparsepack``. A dense directory loads as
    usual. Only safetensors are read.

    Args:
        directory: a checkpoint, packed or dense.
        device: the device of the model: ``auto``, ``cpu``, ``cuda``, ...
        dtype: that of activations and of the weights that are not packed: ``auto`` for the one in ``config.json``.
        activations: ``int8`` where the kernels may round activations to whole numbers (decoding, weights of int8 and
            int4), ``fp32`` for exact ones; None for ``SPARSELLM_ACTIVATIONS`` in the environment, else int8.
        kwargs: passed on to ``from_pretrained``.

    Raises:
        SettingError: the machine has no such device, or ``dtype`` or ``activations`` is unknown.
        FormatError: the directory holds no checkpoint or a damaged one, or transformers cannot load it.
    """
    place = _device(device)
    rounded = activations_of(activations) == "int8"
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise SettingError(f"dtype is {shown(dtype)}; give {', '.join(_DTYPES)}")
    path = checkpoint_path(directory)
    chosen = {"trust_remote_code": False, **kwargs}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **chosen)
    except PackError:
        raise
    except Exception as error:  # damage raises TypeError, KeyError, SafetensorError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"transformers cannot load {path}: {reason[:300]}") from error
    assert isinstance(model, PreTrainedModel)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.rounded = rounded
    torch.nn.Module.to(model.eval(), place)
    gather(model, dense=decodes(model))
    return model


def checkpoint_path(directory: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint. A FormatError says that there is none, its JSON cannot be read, its index names files
    of other directories, or it has an adapter."""
    try:
        path = Path(directory).expanduser()
        there = bool(os.fspath(directory)) and path.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, a null byte
        there = False
    if not there:
        what = shown(os.fspath(directory))
        raise FormatError(f"{what} is not a directory; give one that `sparsellm pack` or save_pretrained wrote")
    if adapter := adapter_in(path):
        raise FormatError(adapter)
    read_config(path)
    if (path / "generation_config.json").exists():
        read_object(path / "generation_config.json")  # transformers takes defaults for a damaged one
    if (path / INDEX).exists():
        shards = read_object(path / INDEX).get("weight_map")
        if not isinstance(shards, dict) or any(Path(str(name)).name != name for name in shards.values()):
            raise FormatError(
                f"{path / INDEX} does not map tensors to files of its directory; copy the checkpoint again"
            )
    return path


def _device(name: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is the first GPU, or the CPU. A SettingError if torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(f"device {str(name)!r:.100} cannot be used here ({reason[:160]}); try cpu or auto") from None
    return device
