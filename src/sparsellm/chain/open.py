"""From what a user names (directory, hub id, ``.gguf`` file, ``demo``) to a checkpoint directory and its config."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsellm.demo_model import demo_gguf
from sparsellm.errors import DataError, ModelError
from sparsellm.gguf import gguf_checkpoint
from sparsellm.json_input import read_object
from sparsellm.packed.checkpoint import is_packed

_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]


def checkpoint_directory(model: str) -> Path:
    """The directory of a checkpoint that may have to be fetched or converted first.

    Args:
        model: a directory, a hub id (``owner/name``), a ``.gguf`` file, or ``demo``.

    Raises:
        ModelError: there is no such model, or it cannot be fetched.
    """
    if model == "demo":
        return gguf_checkpoint(demo_gguf())
    try:
        path = Path(model).expanduser()
        path.lstat()
    except FileNotFoundError:
        pass  # a hub id, perhaps
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL character, an unknown user after the ~
        raise ModelError(f"model {model!r:.100} cannot be looked up: {one_line(error)}") from None
    if not model.strip():
        raise ModelError(
            "the name of the model is empty; give a checkpoint directory, a hub id, a .gguf file, or 'demo'"
        )
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file {model}; give the path of a .gguf file")
        return gguf_checkpoint(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model} has no config.json; give a directory saved by save_pretrained")
        return path
    if path.exists():
        raise ModelError(f"{model} is a file; give a checkpoint directory, a hub id, a .gguf file, or 'demo'")
    return _from_hub(model)


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except HFValidationError:
        reason = "it is no directory here, and no valid hub id (owner/name)"
    except Exception as error:  # the hub client raises requests, httpx and its own errors
        reason = f"it is no directory here, and the hub did not give it ({one_line(error)})"
    raise ModelError(
        f"model {model!r} not found: {reason}; give a checkpoint directory, a hub id, a .gguf file, or 'demo'"
    )


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a decoder-only language model.

    Raises:
        ModelError: unreadable, or not a decoder-only language model, or its weights are quantised.
    """
    read_object(directory / "config.json", ModelError)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        text = config.get_text_config()
    except Exception as error:  # transformers raises ValueError, OSError, KeyError ... for one and the same thing
        raise ModelError(f"transformers cannot read {directory / 'config.json'}: {one_line(error)}") from None
    if not isinstance(text, PretrainedConfig):
        raise ModelError(f"{directory / 'config.json'} has a text_config that a {config.model_type} does not have")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{directory} is a {config.model_type}: an encoder-decoder; only decoder-only models are pruned"
        )
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = known and not _attends_causally(config)
    auto_map = getattr(config, "auto_map", None)
    remote = trust_remote_code and isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    if encoder or not (known or remote):
        raise ModelError(
            f"{directory} is a {config.model_type}, which is not a decoder; only decoder-only models are pruned"
        )
    assert isinstance(config, PretrainedConfig)
    quantization = getattr(config, "quantization_config", None)
    if quantization and not is_packed({"quantization_config": quantization}):
        raise ModelError(f"{directory} has quantised weights (quantization_config); prune the unquantised checkpoint")
    return config


def _attends_causally(config: PretrainedConfig) -> bool:
    """BERT and its kin have a causal head too, but their published weights are encoders (``is_decoder`` false).

    A decoder-only family has no ``...ForMaskedLM``; a family that has both says which it is by ``is_decoder``.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or bool(getattr(config, "is_decoder", False))


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights.

    Raises:
        ModelError: there is none, or transformers cannot read it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"no readable tokenizer in {directory}: {one_line(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how Rust's tokenizers fail on some damaged files
            raise
        raise ModelError(f"no readable tokenizer in {directory}: {one_line(error)}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if not tokenizer.vocab_size:  # some families' tokenizers are made of nothing where no file is
        raise ModelError(f"no readable tokenizer in {directory}: it has no vocabulary; add the tokenizer's files")
    return tokenizer


def check_vocabulary(ids: Tensor, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
    """The token ids, all of which the embedding has.

    A tokenizer may know more tokens than the model, as long as the text has none of them.

    Args:
        ids: ``(windows, seq)``.
        config: of the model.
        tokenizer: that made them; None for ids that the user gave.

    Raises:
        DataError: an id is negative, or not below the model's ``vocab_size``.
    """
    vocabulary = config.get_text_config().vocab_size
    least, most = int(ids.min()), int(ids.max())
    if least >= 0 and most < vocabulary:
        return ids
    if tokenizer is None:
        raise DataError(f"token ids reach from {least} to {most}; the vocabulary has {vocabulary}")
    token = str(tokenizer.convert_ids_to_tokens(most))
    raise DataError(
        f"the tokenizer turns the text into ids up to {most} ({token!r:.50}), and the model has {vocabulary} tokens "
        "(vocab_size in config.json); use the tokenizer that belongs to the model"
    )


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line that is not long."""
    said = " ".join(str(error).split())  # some put the reason into the second line
    named = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in named[:300])
