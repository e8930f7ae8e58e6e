"""Generates the continuation of a prompt and measures the time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import logits_process
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from sparsepack.arguments import MOST, check
from sparsepack.decode import Decoder, decodes
from sparsepack.errors import FormatError, SettingError, shown
from sparsepack.files import context_limit
from sparsepack.module import threads_set

LEAST_TEMPERATURE = 1e-3  # logits divided by less may be infinite
MOST_TEMPERATURE = 1e6
MOST_SEED = (1 << 63) - 1
MOST_STOPS = 16
LONGEST_STOP = 500  # characters
MOST_THREADS = 1024
MOST_TOKENS = 4  # that write a character
CONTEXT = 8  # tokens of the prompt that the first piece of text is read after: enough to end any character


@dataclass(frozen=True)
class Generation:
    """A continuation of a prompt, without it, and its speed.

    Attributes:
        prefill_seconds: from the start to the first new token.
        decode_seconds: from the first new token to the last.
        finish: what ended it: an end-of-text token or a stop string, the limit on new tokens, or the caller."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    threads: int
    finish: Literal["stop", "length", "cancelled"]

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding: tokens after the first, divided by their seconds; 0 if there are none."""
        if self.new_tokens < 2 or not self.decode_seconds:
            return 0.0
        return (self.new_tokens - 1) / self.decode_seconds

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain JSON values, as ``--json`` prints them."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def whole(text: str) -> str:
    """The same text; a ValueError says that it holds half of a surrogate pair, which no UTF-8 has."""
    if text.encode("utf-8", "replace").decode() != text:
        raise ValueError("it holds half of a surrogate pair, which is not text")
    return text


def not_tiny(temperature: float) -> float:
    """The same temperature; a ValueError says that logits cannot be divided by it."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"give 0 for the likeliest token, or at least {LEAST_TEMPERATURE}"
        )
    return temperature


def _check_temperature(temperature: Any) -> None:
    check("temperature", temperature, float, least=0, most=MOST_TEMPERATURE)
    try:
        not_tiny(temperature)
    except ValueError as error:
        raise SettingError(f"temperature is {shown(temperature)}: {error}") from None


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued. A SettingError names a field that is out of range.

    Attributes:
        max_new_tokens: the most tokens to generate.
        temperature: 0 takes the likeliest token each time; above 0, tokens are sampled; None does what the model's
            generation config recommends, which is the likeliest token where it recommends nothing.
        top_p: the probability of the tokens that are sampled from; None for that of the generation config.
        seed: that of the random numbers.
        stop: the text ends before the first of these strings.
        ignore_eos: whether an end-of-text token does not end it, as a measurement of speed needs.
    """

    max_new_tokens: int = 100
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int = 0
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check("max_new_tokens", self.max_new_tokens, int, least=1, most=MOST)
        if self.temperature is not None:
            _check_temperature(self.temperature)
        if self.top_p is not None:
            check("top_p", self.top_p, float, above=0, most=1)
        check("seed", self.seed, int, least=0, most=MOST_SEED)
        check("stop", self.stop, list, tuple)
        check("the number of stop strings", len(self.stop), int, most=MOST_STOPS)
        for index, text in enumerate(self.stop):
            check(f"stop.{index}", text, str)
            length = f"the length of stop.{index}"
            check(length, len(text), int, least=1, most=LONGEST_STOP)
        check("ignore_eos", self.ignore_eos, bool)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
    on_text: Callable[[str], Any] | None = None,
) -> Generation:
    """The continuation of a prompt, up to the end-of-text token or ``max_new_tokens``.

    Of the model's generation config, the end-of-text tokens, ``top_k``, ``top_p``, ``min_p`` and
    ``repetition_penalty`` are used.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        prompt: the text to continue; no chat template is applied.
        max_new_tokens, temperature, seed: those of :class:`Sampling`.
        threads: CPU threads; None for the current setting of torch.
        on_text: called with each new piece of text.

    Raises:
        SettingError: the prompt has no token, or is too long for the model; or another argument is out of range.
        FormatError: a used setting of the generation config has a wrong type or value, or the model computes NaN.
    """
    check("model", model, PreTrainedModel)
    check("tokenizer", tokenizer, PreTrainedTokenizerBase)
    check("prompt", prompt, str)
    try:
        whole(prompt)
    except ValueError as error:
        raise SettingError(f"prompt is {shown(prompt)}: {error}") from None
    check("temperature", temperature, float)
    if threads is not None:
        check("threads", threads, int, least=1, most=MOST_THREADS)
    if on_text is not None:
        check("on_text", on_text, Callable)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return continuation(
        model, tokenizer, ids, sampling, threads=threads, on_text=on_text
    )


@torch.no_grad()
def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    sampling: Sampling,
    *,
    threads: int | None = None,
    on_text: Callable[[str], Any] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generation:
    """As :func:`generate`, for a prompt of token ids ``(1, tokens)``. It ends early, after a token, once ``cancelled``
    returns true."""
    settings = generation_settings(model, sampling)
    length = ids.shape[1]
    limit = context_limit(model.config)
    if length == 0:
        raise SettingError("the prompt is empty; give some text to continue")
    if (most := int(ids.max())) >= (size := model.config.get_text_config().vocab_size):
        raise SettingError(
            f"the prompt has token id {most}, and the model has {size} tokens; resize its embedding"
        )
    if limit is not None and limit < length + sampling.max_new_tokens:
        raise SettingError(
            f"the prompt has {length} tokens and {sampling.max_new_tokens} are to follow; "
            f"the model takes {limit} in all"
        )
    text = _Text(tokenizer, sampling.stop, on_text, cancelled)

    def ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), text.over is not None, device=ids.device)

    ids = ids.to(model.device)
    last = settings.eos_token_id
    ends = {*last} if isinstance(last, list) else {last}
    choices = _processors(
        settings, torch.Generator(ids.device).manual_seed(sampling.seed)
    )
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id
    with threads_set(threads):
        start = time.perf_counter()
        count = torch.get_num_threads()
        if (decoder := _decoder(model, length + sampling.max_new_tokens)) is not None:
            _decode(decoder, ids, choices, ends, sampling.max_new_tokens, text)
        else:  # greedily among what is chosen: its own sampling takes torch's random state, which all threads share
            greedy = GenerationConfig(
                do_sample=False, eos_token_id=settings.eos_token_id
            )
            with_config(model, greedy).generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=padding,
                streamer=text,
                stopping_criteria=StoppingCriteriaList([ended]),
                logits_processor=choices,
            )
    finish: Literal["stop", "length", "cancelled"] = "length"
    if text.over is not None:
        finish = text.over
    elif text.ids[-1] in ends:
        finish = "stop"
    return Generation(
        text.text,
        prompt_tokens=length,
        new_tokens=len(text.ids),
        prefill_seconds=text.times[0] - start,
        decode_seconds=text.times[-1] - text.times[0],
        threads=count,
        finish=finish,
    )


def _decoder(model: PreTrainedModel, positions: int) -> Decoder | None:
    """None for a model that transformers decodes, or where memory lacks for all positions: its cache grows."""
    if not decodes(model):
        return None
    try:
        return Decoder(model, positions)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return None


def _decode(
    decoder: Decoder,
    ids: Tensor,
    choices: LogitsProcessorList,
    ends: set[int | None],
    tokens: int,
    text: _Text,
) -> None:
    """Decodes by the extension as transformers' ``generate`` does."""
    text.put(ids)
    logits = decoder.read(ids)
    for left in range(tokens - 1, -1, -1):
        token = choices(ids, logits.unsqueeze(0)).argmax(-1, keepdim=True)  # type: ignore[arg-type]
        ids = torch.cat((ids, token), dim=1)
        text.put(token)
        if int(token) in ends or text.over:
            break
        if left:
            logits = decoder.step(int(token), ids.shape[1] - 1)
    text.end()


class _Numbers(LogitsProcessor):
    """Refuses NaN, of which the likeliest token is the first one, again and again."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise FormatError(
                "the model computes NaN; take dtype float32; if it has that, evaluate it to see where"
            )
        return scores


class _Draw(LogitsProcessor):
    """Leaves one token, which is drawn as transformers does, by random numbers of its own."""

    def __init__(self, numbers: torch.Generator) -> None:
        self._numbers = numbers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = torch.multinomial(scores.softmax(-1), 1, generator=self._numbers)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def _processors(
    settings: GenerationConfig, numbers: torch.Generator
) -> LogitsProcessorList:
    """What transformers does to logits with these settings, in its order; above temperature 0 its top_k is 50."""
    chosen = LogitsProcessorList([_Numbers()])
    if settings.repetition_penalty is not None:
        chosen.append(
            logits_process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
        )
    if settings.do_sample:
        chosen.append(logits_process.TemperatureLogitsWarper(settings.temperature))
        if settings.top_k != 0:
            chosen.append(
                logits_process.TopKLogitsWarper(
                    50 if settings.top_k is None else settings.top_k
                )
            )
        if settings.top_p is not None:
            chosen.append(logits_process.TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            chosen.append(logits_process.MinPLogitsWarper(settings.min_p))
        chosen.append(_Draw(numbers))
    return chosen


def generation_settings(model: PreTrainedModel, sampling: Sampling) -> GenerationConfig:
    """The generation config that does what is asked, and what the model's own says of the rest.

    Raises:
        FormatError: a setting of the model's own that is used has another type or is out of range.
    """
    try:
        used = _used_settings(model.generation_config)
        temperature = sampling.temperature
        if temperature is None:
            temperature = _recommended_temperature(model.generation_config)
    except SettingError as error:
        raise FormatError(
            f"generation config of the model: {error}; correct generation_config.json, or remove it"
        ) from None
    if sampling.top_p is not None:
        used["top_p"] = sampling.top_p
    if sampling.ignore_eos:
        used["eos_token_id"] = None
    if temperature > 0:
        return GenerationConfig(do_sample=True, temperature=temperature, **used)
    for ignored in ("top_k", "top_p", "min_p"):  # they would only cause warnings
        used[ignored] = None
    return GenerationConfig(do_sample=False, temperature=None, **used)


def _used_settings(config: GenerationConfig | None) -> dict[str, Any]:
    """What is used of a generation config: where a text ends, and how tokens are sampled.

    A SettingError names a value that is wrong."""
    names = ("eos_token_id", "top_k", "top_p", "min_p", "repetition_penalty")
    used = {name: getattr(config, name, None) for name in names}
    last = used["eos_token_id"]
    if isinstance(last, list):
        for index, token in enumerate(last):
            _check_token(f"eos_token_id.{index}", token)
    elif last is not None:
        _check_token("eos_token_id", last)
    if used["top_k"] is not None:
        check("top_k", used["top_k"], int, least=0)
    if used["top_p"] is not None:
        check("top_p", used["top_p"], float, above=0, most=1)
    if used["min_p"] is not None:
        check("min_p", used["min_p"], float, least=0, most=1)
    if used["repetition_penalty"] is not None:
        check("repetition_penalty", used["repetition_penalty"], float, above=0)
    return used


def _check_token(name: str, token: Any) -> None:
    # -1 is how some checkpoints write that there is none
    check(name, token, int, least=-1, most=MOST)


def _recommended_temperature(config: GenerationConfig | None) -> float:
    """The temperature that a generation config recommends, 0 for the likeliest token; raises as the function above."""
    sampled = getattr(config, "do_sample", None)
    temperature = getattr(config, "temperature", None)
    if sampled is not None:
        check("do_sample", sampled, bool)
    if temperature is not None:
        _check_temperature(temperature)
    if not sampled:
        return 0.0
    return 1.0 if temperature is None else temperature


def with_config(model: PreTrainedModel, config: GenerationConfig) -> PreTrainedModel:
    """The same model with another generation config: one that ``generate`` is given is completed from the model's own,
    which other threads read."""
    other = copy.copy(model)
    other.generation_config = config
    return other


class _Text(BaseStreamer):
    """The text of tokens as they come, and the time of each. A piece is given out as soon as no later token changes it:
    its characters are complete, and no stop string can begin in it.

    Attributes:
        over: why no further token is needed; None until then."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        on_text: Callable[[str], Any] | None,
        cancelled: Callable[[], bool],
    ) -> None:
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._on_text = on_text
        self._cancelled = cancelled
        # the last of the prompt, which comes first, and those that follow
        self._tokens: list[int] = []
        # tokens up to the last but one piece, and up to the last
        self._before = 0
        self._read = 0
        self._given = 0  # characters
        self.ids: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self.over: Literal["stop", "cancelled"] | None = None

    def put(self, value: Tensor) -> None:
        new = value.flatten().tolist()
        if not self._tokens:
            tails = [new[-CONTEXT:][start:] or new for start in range(MOST_TOKENS)]
            # The first that begins with a whole character: byte tokens are decoded only if all of a run are characters.
            self._tokens = next(
                (tail for tail in tails if not self._decode(tail).startswith("\ufffd")),
                tails[0],
            )
            self._read = len(self._tokens)
            return
        self.times.append(time.perf_counter())
        self._tokens += new
        self.ids += new
        self._take()
        if self.over is None and self._cancelled():
            self.over = "cancelled"

    def end(self) -> None:
        self._take(last=True)

    def _take(self, last: bool = False) -> None:
        """Reads the tokens after the one piece before, whose text tells where the next one begins: some tokenizers
        write a token in another way at the beginning of a text."""
        if self.over == "stop":
            return
        known = len(self._decode(self._tokens[self._before : self._read]))
        piece = self._decode(self._tokens[self._before :])[known:]
        # the beginning of a character
        if piece and (last or not piece.endswith("\ufffd")):
            self._before = self._read
            self._read = len(self._tokens)
            begin = max(0, len(self.text) - self._longest + 1)
            self.text += piece
            starts = [self.text.find(stop, begin) for stop in self._stop]
            places = [place for place in starts if place >= 0]
            if places:
                self.text = self.text[: min(places)]
                self.over = "stop"
                last = True
        safe = len(self.text)
        if not last:
            safe -= self._held()
        if self._on_text is not None and safe > self._given:
            self._on_text(self.text[self._given : safe])
        self._given = max(self._given, safe)

    def _held(self) -> int:
        """The characters at the end of the text with which a stop string may begin."""
        for size in range(min(len(self.text), self._longest - 1), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0
