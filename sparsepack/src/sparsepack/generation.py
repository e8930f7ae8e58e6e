"""Generates the continuation of a prompt and measures the time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
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

from sparsepack.arguments import MOST, check
from sparsepack.decode import Cache, Decoder, decodes
from sparsepack.errors import FormatError, SettingError, shown
from sparsepack.files import context_limit
from sparsepack.module import threads_set
from sparsepack.streaming import StreamedText

LEAST_TEMPERATURE = 1e-3  # logits divided by less may be infinite
MOST_TEMPERATURE = 1e6
MOST_SEED = (1 << 63) - 1
MOST_PENALTY = 100.0  # logits are not far from it
MOST_STOPS = 16
LONGEST_STOP = 500  # characters
MOST_THREADS = 1024
MOST_LIKELY = 50  # tokens that transformers samples from unless top_k says otherwise


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
        top_k: the number of the likeliest tokens that are sampled from, 0 for all; None as for ``top_p``.
        min_p: the least probability of a sampled token, by the likeliest one's; None as for ``top_p``.
        repetition_penalty: divides the positive logits of tokens that prompt or answer have, and multiplies negative
            ones; None as for ``top_p``.
        frequency_penalty: is taken off a token's logit for each time that the answer has it.
        presence_penalty: is taken off the logits of all tokens that the answer has.
        seed: that of the random numbers.
        stop: the text ends before the first of these strings.
        ignore_eos: whether an end-of-text token does not end it, as a measurement of speed needs.
    """

    max_new_tokens: int = 100
    temperature: float | None = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check("max_new_tokens", self.max_new_tokens, int, least=1, most=MOST)
        if self.temperature is not None:
            _check_temperature(self.temperature)
        if self.top_p is not None:
            check("top_p", self.top_p, float, above=0, most=1)
        if self.top_k is not None:
            check("top_k", self.top_k, int, least=0, most=MOST)
        if self.min_p is not None:
            check("min_p", self.min_p, float, least=0, most=1)
        if self.repetition_penalty is not None:
            penalty = self.repetition_penalty
            check("repetition_penalty", penalty, float, above=0, most=MOST_PENALTY)
        for name in ("frequency_penalty", "presence_penalty"):
            penalty = getattr(self, name)
            check(name, penalty, float, least=-MOST_PENALTY, most=MOST_PENALTY)
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
    answer = Answer(
        model, tokenizer, ids, sampling, on_text=on_text, cancelled=cancelled
    )
    with threads_set(threads):
        return complete(model, tokenizer, answer)


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer: Answer
) -> Generation:
    """An answer that was not begun, made to its end, with the errors of :func:`continuation`."""
    batch = _batch(model, answer)
    if batch is None:
        _by_transformers(model, tokenizer, answer)
    else:
        while batch.answers:
            batch.step()
    return answer.result()


class Answer:
    """A continuation in the making, with the arguments and errors of :func:`continuation`.

    Attributes:
        ids: prompt and answer ``(1, tokens)``.
        room: the most tokens of both.
        chosen: the last token, which is not decoded yet; None until the prompt is read.
        ended: whether nothing is left to do.
        failed: what went wrong, which :meth:`result` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
        sampling: Sampling,
        *,
        on_text: Callable[[str], Any] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        settings = generation_settings(model, sampling)
        _check_prompt(model, ids, sampling.max_new_tokens)
        self.ids = ids.to(model.device)
        self.length = ids.shape[1]
        self.sampling = sampling
        self.room = self.length + sampling.max_new_tokens
        self.chosen: int | None = None
        self.ended = False
        self.failed: BaseException | None = None
        self.text = StreamedText(tokenizer, sampling.stop, on_text, cancelled)
        numbers = torch.Generator(self.ids.device).manual_seed(sampling.seed)
        self.choices = _processors(settings, sampling, self.length, numbers=numbers)
        self.last = settings.eos_token_id
        self._ends = {*self.last} if isinstance(self.last, list) else {self.last}
        self._cancelled = cancelled
        self._threads = torch.get_num_threads()
        self._start = time.perf_counter()
        self._pieces: Iterator[Tensor] = iter(())
        self.cache: Cache | None = None

    def begin(self, cache: Cache | None = None) -> None:
        """Starts the clock; with a cache, the compiled decoder reads and decodes."""
        self._threads = torch.get_num_threads()
        self._start = time.perf_counter()
        self.cache = cache
        if cache is not None:
            self.text.put(self.ids)
            self._pieces = cache.read(self.ids)

    def read(self) -> None:
        """Reads a piece of the prompt; after the last one a token is chosen."""
        logits = next(self._pieces)
        assert self.cache is not None
        if self.cache.length == self.length:
            self._pieces = iter(())  # which held the cache of transformers
            self.take(logits)
        elif self._cancelled():
            self.text.over = "cancelled"
            self.ended = True

    def take(self, logits: Tensor) -> None:
        """Chooses a token by the logits ``(vocabulary,)``."""
        scores = logits.unsqueeze(0)
        # their list asks each of them for its arguments, which takes longer than most of them
        for choice in self.choices:
            scores = choice(self.ids, scores)  # type: ignore[arg-type,assignment]
        token = scores.argmax(-1, keepdim=True)
        self.ids = torch.cat((self.ids, token), dim=1)
        self.text.put(token)
        self.chosen = int(token)
        full = self.ids.shape[1] == self.room
        if self.chosen in self._ends or full or self.text.over is not None:
            self.text.end()
            self.ended = True

    def result(self) -> Generation:
        """What was made; whatever went wrong is raised."""
        if self.failed is not None:
            raise self.failed
        text = self.text
        finish: Literal["stop", "length", "cancelled"] = "length"
        if text.over is not None:
            finish = text.over
        elif text.ids[-1] in self._ends:
            finish = "stop"
        times = text.times or [time.perf_counter()]
        return Generation(
            text.text,
            prompt_tokens=self.length,
            new_tokens=len(text.ids),
            prefill_seconds=times[0] - self._start,
            decode_seconds=times[-1] - times[0],
            threads=self._threads,
            finish=finish,
        )


class Batch:
    """Answers that the compiled decoder makes together; each is the one that it makes alone.

    They join and leave between two steps."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.answers: list[Answer] = []

    def join(self, answer: Answer) -> None:
        """Begins an answer. A RuntimeError says that its cache has no memory."""
        answer.begin(Cache(self._decoder, answer.room))
        self.answers.append(answer)

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Reads a piece of the first prompt that is not read, and decodes a token of all answers whose prompt is.

        Returns the answers that ended, and forgets them. What goes wrong with one leaves the others as they are."""
        ready = [answer for answer in self.answers if answer.chosen is not None]
        for answer in self.answers:
            if answer.chosen is None:
                _try(answer, answer.read)
                break
        if ready:
            tokens = [answer.chosen for answer in ready if answer.chosen is not None]
            caches = [answer.cache for answer in ready if answer.cache is not None]
            logits = self._decoder.step(tokens, caches)
            for answer, row in zip(ready, logits, strict=True):
                _try(answer, answer.take, row)
        return self._ended()

    def fail(self, error: BaseException) -> list[Answer]:
        """Ends all answers by an error, and returns them."""
        for answer in self.answers:
            answer.failed = error
            answer.ended = True
        return self._ended()

    def _ended(self) -> list[Answer]:
        ended = [answer for answer in self.answers if answer.ended]
        self.answers = [answer for answer in self.answers if not answer.ended]
        for answer in ended:
            answer.cache = None
        return ended


def _try(answer: Answer, do: Callable[..., None], *given: Tensor) -> None:
    """Does something for an answer; a failure ends it. Tokenizers raise what is no Exception."""
    try:
        do(*given)
    except BaseException as error:
        answer.failed = error
        answer.ended = True


def _check_prompt(model: PreTrainedModel, ids: Tensor, tokens: int) -> None:
    """A SettingError if the model cannot continue a prompt by so many tokens."""
    length = ids.shape[1]
    limit = context_limit(model.config)
    size = model.config.get_text_config().vocab_size
    if length == 0:
        raise SettingError("the prompt is empty; give some text to continue")
    most = int(ids.max())
    if most >= size:
        raise SettingError(
            f"the prompt has token id {most}, and the model has {size} tokens; resize its embedding"
        )
    if limit is not None and limit < length + tokens:
        raise SettingError(
            f"the prompt has {length} tokens and {tokens} are to follow; the model takes {limit} in all"
        )


def _batch(model: PreTrainedModel, answer: Answer) -> Batch | None:
    """A batch of one answer. None for a model that transformers decodes, or where memory lacks for all positions: its
    cache grows."""
    if not decodes(model):
        return None
    try:
        batch = Batch(Decoder(model, answer.room))
        batch.join(answer)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return None
    return batch


def _by_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer: Answer
) -> None:
    """Makes an answer greedily among what is chosen: transformers' own sampling takes torch's random state, which all
    threads share."""
    text = answer.text

    def ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), text.over is not None, device=ids.device)

    padding = tokenizer.pad_token_id
    if padding is None:
        padding = tokenizer.eos_token_id
    answer.begin()
    greedy = GenerationConfig(do_sample=False, eos_token_id=answer.last)
    with_config(model, greedy).generate(  # type: ignore[operator]
        answer.ids,
        attention_mask=torch.ones_like(answer.ids),
        max_new_tokens=answer.sampling.max_new_tokens,
        pad_token_id=padding,
        streamer=text,
        stopping_criteria=StoppingCriteriaList([ended]),
        logits_processor=answer.choices,
    )


class _Numbers(LogitsProcessor):
    """Refuses NaN, of which the likeliest token is the first one, again and again."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.max().isnan():  # the largest of numbers and NaN is NaN
            raise FormatError(
                "the model computes NaN; take dtype float32; if it has that, evaluate it to see where"
            )
        return scores


class _Draw(LogitsProcessor):
    """Leaves one token, which is drawn as transformers does, by random numbers of its own.

    After ``top_k`` only the tokens that it leaves are sorted and normalised, not the whole vocabulary."""

    def __init__(self, settings: GenerationConfig, numbers: torch.Generator) -> None:
        self._numbers = numbers
        self._temperature = settings.temperature
        self._most = MOST_LIKELY if settings.top_k is None else settings.top_k
        self._warpers: list[LogitsProcessor] = []
        if settings.top_p is not None:
            self._warpers.append(logits_process.TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            self._warpers.append(logits_process.MinPLogitsWarper(settings.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores / self._temperature
        tokens = scores.shape[1]
        if 0 < self._most < tokens:
            least = scores.topk(self._most).values[0, -1]
            left = (scores[0] >= least).nonzero().flatten()
        else:
            left = torch.arange(tokens, device=scores.device)
        likely = scores[:, left]
        for warper in self._warpers:
            likely = warper(input_ids, likely)
        # A token wins a race of exponential times with its probability. Transformers draws one for each token of the
        # vocabulary, and so do we: the same seed then gives the same token.
        times = torch.empty_like(scores[0]).exponential_(generator=self._numbers)
        token = left[(likely[0].softmax(-1) / times[left]).argmax()]
        chosen = torch.full_like(scores, -torch.inf)
        chosen[0, token] = 0.0
        return chosen


class _Penalties(LogitsProcessor):
    """Takes penalties off the logits of tokens that the answer has: for each time, and once."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self._prompt = prompt
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[0, self._prompt :]
        counts = torch.bincount(answer, minlength=scores.shape[1]).to(scores)
        penalties = self._frequency * counts + self._presence * (counts > 0)
        return scores - penalties


def _processors(
    settings: GenerationConfig,
    sampling: Sampling,
    prompt: int,
    *,
    numbers: torch.Generator,
) -> LogitsProcessorList:
    """What transformers does to logits with these settings, in its order."""
    chosen = LogitsProcessorList([_Numbers()])
    if settings.repetition_penalty is not None:
        chosen.append(
            logits_process.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
        )
    frequency = sampling.frequency_penalty
    presence = sampling.presence_penalty
    if frequency or presence:
        chosen.append(_Penalties(prompt, frequency, presence))
    if settings.do_sample:
        chosen.append(_Draw(settings, numbers))
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
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        asked = getattr(sampling, name)
        if asked is not None:
            used[name] = asked
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
