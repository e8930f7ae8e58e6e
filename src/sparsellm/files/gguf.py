"""Converts a ``.gguf`` file to an ordinary Hugging Face checkpoint, once, and keeps it in the cache."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparsellm.errors import MemoryBudgetError, ModelError, one_line
from sparsellm.files.cache import cache_dir, cached
from sparsellm.files.contents import is_intact, write_list
from sparsellm.files.directory import check_room
from sparsellm.files.files import sha256
from sparsellm.files.gguf_header import check_header
from sparsellm.machine import free_memory
from sparsepack.files import read_bytes

FORMAT = 6  # part of the cache key: raise it when the output of this file changes
_MAGIC = b"GGUF"
# Pre-tokenizers by llama.cpp's names. Those of _DIGITS split off each digit, but transformers takes them for GPT-2's.
# Those of _PLAIN are GPT-2's, or stand in files whose text is not split. Releases of transformers without a table of
# pre-tokenizers choose those of _BY_MODEL by the model.
_DIGITS = {
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
    "mellum2",
}
_PLAIN = {
    "",
    "default",
    "gemma4",
    "gpt-2",
    "phi-2",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "gigachat",
    "a.x-4.0",
    "mellum",
}
_BY_MODEL = {"qwen2", "deepseek-r1-qwen"}
# by their blocks, as llama.cpp tells them
_LARGEST_GEMMAS = {
    "gemma2": 46,
    "gemma3_text": 62,
}
_TURN_ENDS = ("<end_of_turn>", "<|end|>", "<|im_end|>", "<|eot_id|>")


def gguf_checkpoint(path: Path, dtype: str = "auto") -> Path:
    """The checkpoint directory for a GGUF file: converted on the first call, taken from the cache on later ones, where
    each verifies the SHA-256 of every file, and one that is damaged is converted again.

    It holds safetensors shards, a config without quantisation, the tokenizer with its chat template, and the generation
    config. transformers reads the file and maps its tensors; no code from a checkpoint runs.

    Weights are rounded to bfloat16, in which models are published, unless ``dtype`` is ``float32``: that is exact for
    block-quantised weights, small integers times an fp16 scale, plus an fp16 minimum. The cache key is the SHA-256 of
    the contents, so the file may be moved, with the dtype and the version of transformers. A ModelError says that
    transformers cannot convert the file, or would lose a part of it, or that the cache cannot be written."""
    if (magic := read_bytes(path, len(_MAGIC), ModelError)[: len(_MAGIC)]) != _MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: it starts with {magic!r}, not {_MAGIC!r}"
        )
    stored = "float32" if dtype == "float32" else "bfloat16"
    made_by = f"v{FORMAT}-{metadata.version('transformers')}"
    return cached(
        cache_dir() / "gguf" / f"{sha256(path)}-{stored}-{made_by}",
        partial(_convert, path, getattr(torch, stored)),
        is_intact,
    )


def _convert(path: Path, dtype: torch.dtype, folder: Path) -> Path:
    """The directory of the checkpoint with parameters in ``dtype``, made in ``folder``."""
    unread, split, weights = check_header(path)
    if split not in _DIGITS | _PLAIN | _known_splits():
        raise ModelError(
            f"{path} splits text as {split}; give a Hugging Face checkpoint, or update transformers"
        )
    check_room(folder, dtype.itemsize * weights)
    if 4 * weights > (free := free_memory()):  # transformers holds all of them in fp32
        said = f"{path} has {weights:,} weights: converting them takes {4 * weights / 1e9:.1f} GB of memory, and"
        raise MemoryBudgetError(
            f"{said} {free / 1e9:.1f} GB are free; give the Hugging Face checkpoint"
        )
    directory = folder / "checkpoint"
    with without_bars():
        tokenizer, loaded = _load(path, folder)
        _complete(path, loaded.config.get_text_config())
        model = _plain(loaded, dtype)
        _refuse_lost(path, unread, model)
        if split in _DIGITS:
            _split_digits(tokenizer)
        _end_turns(model, tokenizer)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    settings = directory / "tokenizer_config.json"
    # Tools with transformers 4 refuse the class name that version 5 writes.
    named = {
        **json.loads(settings.read_text(encoding="utf-8")),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    settings.write_text(
        json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    write_list(directory, {})
    return directory


def _load(path: Path, folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model of the file, as transformers reads them; ``folder`` is for links to it."""
    # Imported here: transformers takes seconds, and a conversion happens once.
    import transformers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    alone = folder / "gguf" / path.name
    alone.parent.mkdir()
    # transformers would take a tokenizer.json next to the file
    alone.symlink_to(path.resolve())
    # in later releases, which else keep weights quantised
    config = getattr(transformers, "GgufConfig", None)
    dense = {} if config is None else {"quantization_config": config(dequantize=True)}
    try:
        # Not AutoTokenizer, which would parse the whole file again to choose this class.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            alone.parent, gguf_file=path.name
        )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            alone.parent, gguf_file=path.name, output_loading_info=True, **dense
        )
    except Exception as error:  # a damaged file raises any of numpy's, gguf's or transformers' own errors
        raise ModelError(
            f"{path} cannot be converted: {one_line(error)}; the file is damaged or cut short (fetch it again), or "
            f"transformers {transformers.__version__} does not read its architecture (give a Hugging Face "
            "checkpoint instead)"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers makes random ones
        raise ModelError(
            f"{path} cannot be converted: it has no weight {missing[0]}, nor {len(missing) - 1} more of its model; "
            "the file is damaged, or of another model: fetch it again"
        )
    return tokenizer, model


def _plain(loaded: Any, dtype: torch.dtype) -> Any:
    """A model without quantisation that has the weights of a loaded one, in ``dtype``: transformers does not save a
    model that it dequantised."""
    from transformers import AutoModelForCausalLM

    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(loaded.config)
    for parameter in loaded.parameters():
        parameter.data = parameter.data.to(dtype)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.config.dtype = dtype
    return plain


def _split_digits(tokenizer: Any) -> None:
    """Makes a tokenizer split off each digit, which transformers does not read from the file."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(False)]
    )


def _end_turns(model: Any, tokenizer: Any) -> None:
    """Adds the tokens that end a turn of a chat to the one end that transformers reads."""
    ends = [name for name in _TURN_ENDS if name in tokenizer.get_vocab()]
    known = model.config.eos_token_id
    if isinstance(known, int) and ends:
        model.generation_config.eos_token_id = sorted(
            {known, *tokenizer.convert_tokens_to_ids(ends)}
        )


def _known_splits() -> set[str]:
    """The ways of splitting text for which transformers has rules; it takes any other for GPT-2's."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS,
        )
    except ImportError:
        return _BY_MODEL
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _complete(path: Path, config: Any) -> None:
    """Sets what the file says of positions and attention, and transformers leaves at its default."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    said = {
        name.partition(".")[2]: x.contents()
        for name, x in fields.items()
        if not name.startswith("tokenizer.")
    }
    ropes = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in ropes:
        ropes["rope_theta"] = said.get("rope.freq_base", ropes["rope_theta"])
    width = config.hidden_size // (getattr(config, "num_attention_heads", None) or 1)
    if "partial_rotary_factor" in ropes and "rope.dimension_count" in said:
        ropes["partial_rotary_factor"] = said["rope.dimension_count"] / (
            getattr(config, "head_dim", None) or width
        )
    for name in (
        "attention.sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ):
        value = said.get(name)
        attribute = name.rpartition(".")[2]
        # Phi-4 says 0, which is none
        if hasattr(config, attribute) and isinstance(value, int | float) and value:
            setattr(config, attribute, value)
    # which no key of the file has
    if config.num_hidden_layers == _LARGEST_GEMMAS.get(config.model_type):
        config.query_pre_attn_scalar = width


def _refuse_lost(path: Path, unread: list[str], model: Any) -> None:
    """Raises ModelError if the model lacks one of the scalings and biases ``unread``: it would compute something
    else."""
    ropes = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # one, or one for each kind of layer
    kinds = [
        ropes,
        *(rope for rope in ropes.values() if isinstance(rope, dict)),
    ]
    scaled = any(rope.get("rope_type", "default") != "default" for rope in kinds)
    biased = any(
        re.search(r"att\w*\.\w+\.bias$", name) for name, _ in model.named_parameters()
    )
    for name in unread:
        if not (biased if name.endswith(".bias") else scaled):
            raise ModelError(
                f"{path} has {name}, which transformers does not read; give the Hugging Face checkpoint"
            )


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hides the progress bars of transformers: some obey a setting of its own, some are written to stderr directly."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    hidden = io.StringIO()
    # through which a rich console still writes
    vars(hidden)["rich_proxied_file"] = sys.stderr
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(hidden):
            yield
    finally:
        logging.set_verbosity(level)
        if was_enabled:
            logging.enable_progress_bar()
