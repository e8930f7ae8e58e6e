"""Loads a checkpoint, packed or dense, into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsepack.arguments import SHORT_DTYPES, check
from sparsepack.checkpoint import adapter_in, opened_weights
from sparsepack.decode import decodes
from sparsepack.errors import FormatError, PackError, SettingError, shown
from sparsepack.files import INDEX, read_object, unfit_size, weight_files
from sparsepack.module import PackedLinear, activations_of, gather

_DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        device: the device of the model: ``auto``, ``cpu``, ``cuda``, ...; a ``device_map`` in ``kwargs`` replaces it.
        dtype: that of activations and of the weights that are not packed: ``auto`` for the one in ``config.json``.
        activations: ``int8`` where the kernels may round activations to whole numbers (decoding, weights of int8 and
            int4), ``fp32`` for exact ones; None for ``SPARSELLM_ACTIVATIONS`` in the environment, else int8.
        kwargs: passed on to ``from_pretrained``.

    Raises:
        SettingError: the machine has no such device, or ``dtype`` or ``activations`` is unknown.
        FormatError: the directory holds no checkpoint or a damaged one, or transformers cannot load it.
    """
    check("directory", directory, str, os.PathLike)
    check("device", device, str, torch.device)
    check("dtype", dtype, str, torch.dtype)
    if activations is not None:
        check("activations", activations, str)
    place = _device(device)
    rounded = activations_of(activations) == "int8"
    if isinstance(dtype, str):
        dtype = SHORT_DTYPES.get(dtype, dtype)
        if dtype not in _DTYPES:
            raise SettingError(f"dtype is {shown(dtype)}; give {', '.join(_DTYPES)}")
    path = checkpoint_path(directory)
    _check_sizes(path)
    chosen = {"trust_remote_code": False, **kwargs}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, **chosen
        )
    except PackError:
        raise
    except (
        Exception
    ) as error:  # damage raises TypeError, KeyError, SafetensorError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"transformers cannot load {path}: {reason[:300]}") from error
    model, report = loaded
    assert isinstance(model, PreTrainedModel)
    # transformers makes random ones, and warns
    if missing := sorted(report["missing_keys"]):
        raise FormatError(
            f"weight {missing[0]} of the model of config.json is not in {path}, nor are {len(missing) - 1} more; the "
            "checkpoint is incomplete, or of another model: copy it again"
        )
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.rounded = rounded
    if chosen.get("device_map") is None:
        torch.nn.Module.to(model, place)
    gather(model.eval(), dense=decodes(model))
    return model


def checkpoint_path(directory: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint. A FormatError says that there is none, its JSON cannot be read, its index names files
    of other directories, or it has an adapter."""
    try:
        path = Path(directory).expanduser()
        there = bool(os.fspath(directory)) and path.is_dir()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # too long a name, no such user, a null byte
        there = False
    if not there:
        what = shown(os.fspath(directory))
        raise FormatError(
            f"{what} is not a directory; give one that `sparsellm pack` or save_pretrained wrote"
        )
    if adapter := adapter_in(path):
        raise FormatError(adapter)
    read_object(path / "config.json")
    if (path / "generation_config.json").exists():
        # transformers takes defaults for a damaged one
        read_object(path / "generation_config.json")
    if weight_files(path)[1] and not isinstance(
        read_object(path / INDEX).get("metadata"), dict
    ):
        raise FormatError(
            f'{path / INDEX} has no metadata, which transformers needs; add "metadata": {{}} to it'
        )
    return path


def _check_sizes(path: Path) -> None:
    """Refuses a config for which transformers would build modules for hours, before it does; and a tensor in two files,
    of which transformers takes the one that it reads last."""
    config = read_object(path / "config.json")
    shapes: dict[str, tuple[int, ...]] = {}
    first_file: dict[str, str] = {}
    for file in weight_files(path)[0]:
        with opened_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name in first_file:
                    raise FormatError(
                        f"tensor {name} is in both {first_file[name]} and {file.name} of {path}; keep the files of one "
                        "checkpoint only"
                    )
                first_file[name] = file.name
                shapes[name] = tuple(opened.get_slice(name).get_shape())
    text = config.get("text_config")
    if isinstance(text, dict):
        config |= text
    unfit = unfit_size(config, shapes)
    if unfit is not None:
        raise FormatError(f"{path / 'config.json'} {unfit}; copy the checkpoint again")


def _device(name: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is the first GPU, or the CPU. A SettingError if torch cannot use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingError(
            f"device {str(name)!r:.100} cannot be used here ({reason[:160]}); try cpu or auto"
        ) from None
    return device
