"""Conversations as token ids, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm.errors import DataError, ModelError
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.model.open import load_tokenizer
from sparsellm.text.conversations import prepare, rendered
from sparsepack.generation import Sampling, generation_settings
from sparsepack.loading import checkpoint_path, load

Message = dict[str, str]
"""``role`` and ``content``, and perhaps ``name``."""


def open_model(
    name: str, options: dict[str, str], *, template: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a name, packed or dense, and its tokenizer. ``options`` are those of
    ``sparsepack.loading.load``. A UserError says that the model, one of the options or the generation config cannot
    be found, read or used, or that an asked-for chat ``template`` is missing."""
    directory = checkpoint_path(checkpoint_directory(name))
    tokenizer = load_tokenizer(directory)  # first: weights take longer
    if template:
        check_template(tokenizer)
    if tokenizer.chat_template:
        prepare()  # else the first conversation keeps all answers waiting for a second
    model = load(directory, **options)
    generation_settings(model, Sampling(temperature=None))
    return model, tokenizer


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Tensor:
    """The token ids ``(1, tokens)`` of a conversation, up to where the answer begins. A ModelError says that the
    tokenizer has no chat template, a DataError that the template refuses it, such as its order of roles, or takes too
    much time or memory."""
    check_template(tokenizer)
    try:
        text = rendered(tokenizer, messages, asks=True)
    except DataError as error:
        raise DataError(
            f"the chat template of the model refuses the conversation: {error}"
        ) from None
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """A ModelError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ModelError(
            "the model has no chat template, so it takes no conversation; continue a text, with `sparsellm generate`"
        )
