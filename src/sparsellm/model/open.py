"""The config, the tokenizer and the vocabulary of a checkpoint directory, checked, and compared with another's."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from sparsellm.errors import DataError, ModelError, one_line
from sparsellm.files.reader import CheckpointReader
from sparsellm.inputs import read_object
from sparsepack.checkpoint import is_packed
from sparsepack.files import SIZES, unfit_size

DIFFER = "config and weights are of different models: download the checkpoint again"


def config_file(place: Path) -> Path:
    """The file of a config, which is ``place`` or in it."""
    return place if place.is_file() else place / "config.json"


def load_config(
    directory: Path, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The config of a decoder-only language model: that of a checkpoint, or a JSON file. A ModelError says that it or
    the generation config cannot be read, or that it describes another kind of model, or quantised weights."""
    path = config_file(directory)
    read_object(path, error=ModelError)
    # else transformers takes its own defaults
    if (generation := directory / "generation_config.json").exists():
        read_object(generation, error=ModelError)
    try:
        config = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
        text = config.get_text_config()
    except Exception as error:  # transformers raises ValueError, OSError, KeyError, ... for the same fault
        raise ModelError(
            f"transformers cannot read {path}: {one_line(error)}"
        ) from None
    if not isinstance(text, PretrainedConfig):
        raise ModelError(
            f"{path} has a text_config that a {config.model_type} does not have"
        )
    # BERT and similar families have a causal head too, but are encoders. A decoder-only family has no ...ForMaskedLM;
    # in a family that has both heads, is_decoder decides.
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    auto_map = getattr(config, "auto_map", None)
    remote = (
        trust_remote_code
        and isinstance(auto_map, dict)
        and "AutoModelForCausalLM" in auto_map
    )
    if (
        getattr(config, "is_encoder_decoder", False)
        or (known and encoder)
        or not (known or remote)
    ):
        raise ModelError(
            f"{directory} is a {config.model_type}; only decoder-only language models are pruned"
        )
    assert isinstance(config, PretrainedConfig)
    quantization = getattr(config, "quantization_config", None)
    if quantization and not is_packed({"quantization_config": quantization}):
        raise ModelError(
            f"{directory} has quantised weights (quantization_config); give the one it was made from"
        )
    config.return_dict = True  # without it, few families run
    return config


def check_sizes(
    config: PretrainedConfig, place: Path, reader: CheckpointReader | None
) -> None:
    """Refuses sizes in the config with which transformers would take hours to build a model, or fail: width,
    vocabulary, and numbers of heads, layers or experts below 1 or far beyond the weights, if there are any."""
    text = config.get_text_config()
    # transformers maps the family's own names to these
    sizes = {name: getattr(text, name, None) for name in SIZES}
    shapes = None
    if reader is not None:
        shapes = {name: reader.shape(name) for name in reader}
    if (unfit := unfit_size({**text.to_dict(), **sizes}, shapes)) is not None:
        raise ModelError(
            f"{place} {unfit}; {DIFFER if shapes is not None else 'correct the config'}"
        )


def load_tokenizer(
    directory: Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory. A ModelError says that there is none, or that it cannot be used."""
    for path in directory.iterdir():
        # transformers would wait for a pipe's writer
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(
                f"{path} is not an ordinary file; replace it by the original model's"
            )
    if (settings := directory / "tokenizer_config.json").exists():
        read_object(settings, error=ModelError)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
        # some settings are only looked at when they are used
        tokenizer.decode(tokenizer("a text")["input_ids"])
    except BaseException as error:
        # The Rust tokenizers raise PanicException, which is not an Exception, for some damaged files.
        if (
            not isinstance(error, Exception)
            and type(error).__name__ != "PanicException"
        ):
            raise
        why = one_line(error)
        if not any(
            re.match("tokenizer|vocab|merges|spiece|sentencepiece", path.name)
            for path in directory.iterdir()
        ):
            why = "it has no tokenizer's files; copy tokenizer.json and tokenizer_config.json from the original model"
        raise ModelError(f"no readable tokenizer in {directory}: {why}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    # without files, the tokenizers of some families load with an empty vocabulary
    if not tokenizer.vocab_size:
        raise ModelError(
            f"no readable tokenizer in {directory}: it has no vocabulary; add the tokenizer's files"
        )
    return tokenizer


def check_vocabulary(
    ids: Tensor,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tensor:
    """The token ids ``(windows, seq)`` unchanged, if the embedding has a row for each; else a DataError. ``tokenizer``
    produced them (None: the user passed them); it may have more tokens than the text uses."""
    vocabulary = config.get_text_config().vocab_size
    least = int(ids.min())
    most = int(ids.max())
    if least >= 0 and most < vocabulary:
        return ids
    if tokenizer is None:
        raise DataError(
            f"token ids reach from {least} to {most}; the vocabulary has {vocabulary}"
        )
    token = str(tokenizer.convert_ids_to_tokens(most))
    raise DataError(
        f"the tokenizer turns the text into ids up to {most} ({token!r:.50}), and the model has {vocabulary} tokens "
        "(vocab_size in config.json); use the tokenizer that belongs to the model"
    )


def shape_difference(weights: CheckpointReader, others: CheckpointReader) -> str | None:
    """The first weight of ``others`` that ``weights`` lacks or has in another shape, as a clause; None if none."""
    for name in others:
        if name not in weights:
            return f"weight {name} is missing"
        if weights.shape(name) != others.shape(name):
            return f"weight {name} has shape {weights.shape(name)}, not {others.shape(name)}"
    return None
