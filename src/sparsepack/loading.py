"""Loads a checkpoint, packed or dense, into memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsellm.arguments import checked_arguments
from sparsellm.chain.open import load_config
from sparsellm.errors import ModelError, SparseLLMError
from sparsellm.machine.devices import resolve_device
from sparsepack.module import activations_of, gather, set_activations
from sparsepack.registration import register_when_needed


@checked_arguments()
def load(
    directory: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "auto",
    activations: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model from a directory that :func:`sparsellm.pack` wrote; its linears stay packed in memory.

    ``AutoModelForCausalLM.from_pretrained`` returns the same after ``import sparsellm``. A dense directory loads as
    usual. Only safetensors are read.

    Args:
        directory: a checkpoint, packed or dense.
        device: the device of the model: ``auto``, ``cpu``, ``cuda``, ...
        dtype: of activations and of the weights that are not packed: ``auto`` for the one in ``config.json``.
        activations: ``int8`` where the kernels may round activations to whole numbers (decoding, weights of int8 and
            int4), ``fp32`` for exact ones; None for ``SPARSELLM_ACTIVATIONS`` in the environment, else int8.
        kwargs: passed on to ``from_pretrained``.

    Raises:
        RecipeError: the machine has no such device.
        KernelError: ``activations`` is unknown.
        ModelError: there is no checkpoint, or it is not a decoder-only model.
        StorageError: the files are damaged.
    """
    place = resolve_device(device)
    activations_of(activations)
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise ModelError(f"{directory} is no directory; give one that `sparsellm pack` or save_pretrained wrote")
    load_config(path, trust_remote_code=bool(kwargs.get("trust_remote_code", False)))
    register_when_needed()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **kwargs)
    except SparseLLMError:
        raise
    except Exception as error:  # damage raises TypeError, KeyError, SafetensorError, ...
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"transformers cannot load {directory}: {first_line[:300]}") from error
    assert isinstance(model, PreTrainedModel)
    set_activations(model, activations)
    torch.nn.Module.to(model.eval(), place)
    gather(model)
    return model
