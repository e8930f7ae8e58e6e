"""Generates the continuation of a prompt and measures the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparsepack.arguments import checked
from sparsepack.decode import Decoder, decodes
from sparsepack.errors import FormatError, SettingError, refusal
from sparsepack.module import threads_set

TokenId = Annotated[int, Field(ge=-1, lt=1 << 31)]  # -1 is how some checkpoints write that there is none
Tokens = Annotated[int, Field(ge=1, lt=1 << 31)]


@dataclass(frozen=True)
class Generation:
    """A continuation of a prompt, without it, and its speed.

    Attributes:
        prefill_seconds: from the start to the first new token.
        decode_seconds: from the first new token to the last.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    threads: int

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding: tokens after the first, divided by their seconds; 0 if there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain JSON values, as ``--json`` prints them."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


class _Settings(BaseModel):
    """The part of a checkpoint's generation config that is used: where a text ends, and how tokens are sampled."""

    model_config = ConfigDict(strict=True, from_attributes=True, allow_inf_nan=False)

    eos_token_id: TokenId | list[TokenId] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None


@checked
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: Tokens = 100,
    temperature: Annotated[float, Field(ge=0, le=1e6, strict=False)] = 0.0,
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0,
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None,
    on_text: Callable[[str], Any] | None = None,
) -> Generation:
    """The continuation of a prompt, up to the end-of-text token or ``max_new_tokens``.

    Of the model's generation config, the end-of-text tokens, ``top_k``, ``top_p``, ``min_p`` and
    ``repetition_penalty`` are used.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        prompt: the text to continue; no chat template is applied.
        max_new_tokens: the most tokens to generate.
        temperature: 0 takes the most likely token each time; above 0, tokens are sampled.
        seed: that of the sampling.
        threads: CPU threads; None for the current setting of torch.
        on_text: called with each new piece of text.

    Raises:
        SettingError: the prompt has no token, or is too long for the model; or another argument is out of range.
        FormatError: a setting of the generation config that is used has another type or is out of range.
    """
    settings = _settings(model, temperature)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = int(inputs["input_ids"].shape[1])
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length == 0:
        raise SettingError("the prompt is empty; give some text to continue")
    if isinstance(limit, int) and 0 < limit < length + max_new_tokens:
        raise SettingError(
            f"the prompt has {length} tokens and {max_new_tokens} are to follow; the model takes {limit} in all"
        )
    streamer = _Streamer(tokenizer, on_text)
    torch.manual_seed(seed)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chosen = {"max_new_tokens": max_new_tokens, "pad_token_id": padding}
    with torch.no_grad(), generation_config_set(model, settings), threads_set(threads):
        start, count = time.perf_counter(), torch.get_num_threads()
        if decodes(model):
            output = _decode(model, inputs["input_ids"], settings, max_new_tokens, streamer)
        else:
            output = model.generate(**inputs, **chosen, streamer=streamer)  # type: ignore[operator]
    new = output[0, length:]
    first, last = streamer.times[0], streamer.times[-1]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Generation(str(text), length, len(new), first - start, last - first, count)


def _decode(model: PreTrainedModel, ids: Tensor, settings: GenerationConfig, limit: int, streamer: _Streamer) -> Tensor:
    """The prompt and its continuation ``(1, tokens)``, decoded by the extension as transformers' ``generate`` does."""
    last = settings.eos_token_id
    ends = set(last if isinstance(last, list) else [last])
    choices = _processors(settings)
    decoder = Decoder(model, ids.shape[1] + limit)
    streamer.put(ids)
    logits = decoder.read(ids)
    for left in range(limit - 1, -1, -1):
        scores = choices(ids, logits.unsqueeze(0))  # type: ignore[arg-type]
        token = torch.multinomial(scores.softmax(-1), 1) if settings.do_sample else scores.argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
        streamer.put(token.view(-1))
        if int(token) in ends or left == 0:
            break
        logits = decoder.step(int(token), ids.shape[1] - 1)
    streamer.end()
    return ids


def _processors(settings: GenerationConfig) -> LogitsProcessorList:
    """What transformers does to logits with these settings, in its order; above temperature 0 its top_k is 50."""
    chosen = LogitsProcessorList()
    if settings.repetition_penalty is not None:
        chosen.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.do_sample:
        chosen.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k != 0:
            chosen.append(TopKLogitsWarper(50 if settings.top_k is None else settings.top_k))
        if settings.top_p is not None:
            chosen.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            chosen.append(MinPLogitsWarper(settings.min_p))
    return chosen


def _settings(model: PreTrainedModel, temperature: float) -> GenerationConfig:
    try:
        used = _Settings.model_validate(model.generation_config)
    except ValidationError as error:
        raise FormatError(
            f"generation config of the model: {refusal(error)}; correct generation_config.json, or remove it"
        ) from None
    if temperature > 0:
        return GenerationConfig(do_sample=True, temperature=temperature, **used.model_dump())
    sampling = {"top_k", "top_p", "min_p"}  # they would only cause warnings
    return GenerationConfig(
        do_sample=False, temperature=None, top_k=None, top_p=None, **used.model_dump(exclude=sampling)
    )


@contextmanager
def generation_config_set(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Puts a config in place of the model's: one passed to ``generate`` is completed from the model's own."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


class _Streamer(TextStreamer):
    """transformers' streamer of printable text, which also records the time of each token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], Any] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text is not None and text:
            self.on_text(text)
