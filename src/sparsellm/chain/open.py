"""From what a user names (directory, hub id, ``.gguf`` file, ``demo``) to a checkpoint directory and its config."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsellm.demo_model import demo_gguf
from sparsellm.errors import ModelError
from sparsellm.gguf import gguf_checkpoint
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
    path = Path(model).expanduser()
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
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"it is no directory here, and the hub did not give it ({first_line[:200]})"
    raise ModelError(
        f"model {model!r} not found: {reason}; give a checkpoint directory, a hub id, a .gguf file, or 'demo'"
    )


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a decoder-only language model.

    Raises:
        ModelError: unreadable, or not a decoder-only language model, or its weights are quantised.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises ValueError, OSError, KeyError ... for one and the same thing
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"transformers cannot read {directory / 'config.json'}: {first_line[:300]}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{directory} is a {config.model_type}: an encoder-decoder; only decoder-only models are pruned"
        )
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = known and not _attends_causally(config)
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
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
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"no readable tokenizer in {directory}: {first_line[:300]}") from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if not tokenizer.vocab_size:  # some families' tokenizers are made of nothing where no file is
        raise ModelError(f"no readable tokenizer in {directory}: it has no vocabulary; add the tokenizer's files")
    return tokenizer
