"""Generates the continuation of a prompt and measures the time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
# What a generation config may recommend, with its limits
_RECOMMENDED: dict[str, dict[str, float]] = {
    "temperature": {"least": 0, "most": MOST_TEMPERATURE},
    "top_p": {"above": 0, "most": 1},
    "top_k": {"least": 0, "most": MOST},
    "min_p": {"least": 0, "most": 1},
    "repetition_penalty": {"above": 0, "most": MOST_PENALTY},
}
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


def check_text(name: str, text: Any) -> None:
    """A SettingError says that a value is no text, or holds half of a surrogate pair, which no UTF-8 has."""
    check(name, text, str)
    if text.encode("utf-8", "replace").decode() != text:
        raise SettingError(
            f"{name} is {shown(text)}: it holds half of a surrogate pair, which is not text"
        )


def _check_recommended(values: Mapping[str, Any]) -> None:
    """A SettingError names the first setting of ``_RECOMMENDED`` that is out of range; None is in range."""
    for name, limits in _RECOMMENDED.items():
        value = values[name]
        if value is not None:
            check(name, value, int if name == "top_k" else float, **limits)
    temperature = values["temperature"]
    if temperature is not None and 0 < temperature < LEAST_TEMPERATURE:
        raise SettingError(
            f"temperature is {shown(temperature)}: give 0 for the likeliest token, or at least {LEAST_TEMPERATURE}"
        )


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
        _check_recommended(vars(self))
        for name in ("frequency_penalty", "presence_penalty"):
            penalty = getattr(self, name)
            check(name, penalty, float, least=-MOST_PENALTY, most=MOST_PENALTY)
        check("seed", self.seed, int, least=0, most=MOST_SEED)
        check("stop", self.stop, list, tuple)
        check("the number of stop strings", len(self.stop), int, most=MOST_STOPS)
        for index, text in enumerate(self.stop):
            check_text(f"stop.{index}", text)
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
        max_new_tokens, temperature, seed: those of ``Sampling``.
        threads: CPU threads; None for the current setting of torch.
        on_text: called with each new piece of text.

    Raises:
        SettingError: the prompt has no token, or is too long for the model; or another argument is out of range.
        FormatError: a used setting of the generation config has a wrong type or value, or the model computes NaN.
    """
    check("model", model, PreTrainedModel)
    check("tokenizer", tokenizer, PreTrainedTokenizerBase)
    check_text("prompt", prompt)
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
    """As ``generate``, for a prompt of token ids ``(1, tokens)``. It ends early, after a token, once ``cancelled``
    returns true."""
    answer = Answer(
        model, tokenizer, ids, sampling, on_text=on_text, cancelled=cancelled
    )
    with threads_set(threads):
        batch = _batch(model, answer)
        while batch.answers:
            batch.step()
    return answer.result()


class Answer:
    """A continuation in the making, with the arguments and errors of ``continuation``.

    Attributes:
        ids: prompt and answer ``(1, tokens)``.
        room: the most tokens of both.
        chosen: the last token, which is not decoded yet; None until the prompt is read.
        ended: whether nothing is left to do.
        failed: what went wrong, which ``result`` raises.
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
        self._model = model
        self.ids = ids.to(model.device)
        self.length = ids.shape[1]
        self.sampling = sampling
        self.room = self.length + sampling.max_new_tokens
        self.chosen: int | None = None
        self.ended = False
        self.failed: BaseException | None = None
        self.text = StreamedText(tokenizer, sampling.stop, on_text, cancelled)
        numbers = torch.Generator(self.ids.device).manual_seed(sampling.seed)
        self._choices = _processors(settings, sampling, self.length, numbers=numbers)
        self._last = settings.eos_token_id
        self._ends = {*self._last} if isinstance(self._last, list) else {self._last}
        self._cancelled = cancelled
        self._threads = 0
        self._start = 0.0
        self._pieces: Iterator[Tensor] = iter(())
        self.cache: Cache | None = None

    def begin(self, cache: Cache | None) -> None:
        """Starts the clock; with a cache, the compiled decoder reads and decodes."""
        self._threads = torch.get_num_threads()
        self._start = time.perf_counter()
        self.cache = cache
        if cache is not None:
            self.text.put(self.ids)
            self._pieces = cache.read(self.ids)

    def read(self) -> None:
        """Reads a piece of the prompt; after the last one a token is chosen. Without a cache transformers does all."""
        if self.cache is None:
            self._generate()
            return
        logits = next(self._pieces)
        if self.cache.length == self.length:
            self._pieces = iter(())  # which held the cache of transformers
            self.take(logits)
        elif self._cancelled():
            self.text.over = "cancelled"
            self.end()

    def _generate(self) -> None:
        """Chooses greedily among what is left: transformers' own sampling takes torch's random state, which all
        threads share."""

        def ended(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            over = self.text.over is not None
            return torch.full((len(ids),), over, device=ids.device)

        greedy = GenerationConfig(do_sample=False, eos_token_id=self._last)
        with_config(self._model, greedy).generate(  # type: ignore[operator]
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=self.sampling.max_new_tokens,
            pad_token_id=0,  # one sequence is never padded
            streamer=self.text,
            stopping_criteria=StoppingCriteriaList([ended]),
            logits_processor=self._choices,
        )
        self.end()

    def take(self, logits: Tensor) -> None:
        """Chooses a token by the logits ``(vocabulary,)``."""
        scores = logits.unsqueeze(0)
        # their list asks each of them for its arguments, which takes longer than most of them
        for choice in self._choices:
            scores = choice(self.ids, scores)  # type: ignore[arg-type,assignment]
        token = scores.argmax(-1, keepdim=True)
        self.ids = torch.cat((self.ids, token), dim=1)
        self.text.put(token)
        self.chosen = int(token)
        full = self.ids.shape[1] == self.room
        if self.chosen in self._ends or full or self.text.over is not None:
            self.text.end()
            self.end()

    def end(self, failed: BaseException | None = None) -> None:
        """Nothing is left to do, and no memory is needed for it."""
        self.ended = True
        self.failed = failed
        self.cache = None
        self._pieces = iter(())

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
    """Answers that the compiled decoder makes together; each is the one that it makes alone. Without a decoder,
    transformers makes one in a step.

    They join and leave between two steps."""

    def __init__(self, decoder: Decoder | None) -> None:
        self._decoder = decoder
        self.answers: list[Answer] = []

    def join(self, answer: Answer) -> None:
        """Begins an answer. A RuntimeError says that its cache has no memory."""
        cache = None
        if self._decoder is not None:
            cache = Cache(self._decoder, answer.room)
        answer.begin(cache)
        self.answers.append(answer)

    @torch.no_grad()
    def step(self) -> None:
        """Reads a piece of the first prompt that is not read, and decodes a token of all answers whose prompt is.

        Answers that end leave. What goes wrong with one leaves the others as they are."""
        ready = [answer for answer in self.answers if answer.chosen is not None]
        for answer in self.answers:
            if answer.chosen is None:
                _try([answer], answer.read)
                break
        if ready and self._decoder is not None:
            _try(ready, self._decode, self._decoder, ready)
        self.answers = [answer for answer in self.answers if not answer.ended]

    def _decode(self, decoder: Decoder, ready: list[Answer]) -> None:
        tokens = [answer.chosen for answer in ready if answer.chosen is not None]
        caches = [answer.cache for answer in ready if answer.cache is not None]
        for answer, row in zip(ready, decoder.step(tokens, caches), strict=True):
            _try([answer], answer.take, row)


def _try(answers: list[Answer], do: Callable[..., None], *given: Any) -> None:
    """Does something for some answers; a failure ends them. Tokenizers raise what is no Exception."""
    try:
        do(*given)
    except BaseException as error:
        for answer in answers:
            answer.end(error)


def _check_prompt(model: PreTrainedModel, ids: Tensor, tokens: int) -> None:
    """A SettingError if the model cannot make that many tokens after a prompt."""
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


def _batch(model: PreTrainedModel, answer: Answer) -> Batch:
    """A batch of one answer. Transformers makes it where memory lacks for all positions: its cache grows."""
    batch = Batch(None)
    try:
        if decodes(model):
            batch = Batch(Decoder(model, answer.room))
        batch.join(answer)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        batch = Batch(None)
        batch.join(answer)
    return batch


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
            # which refuses a whole number
            logits_process.RepetitionPenaltyLogitsProcessor(
                float(settings.repetition_penalty)
            )
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
    config = model.generation_config
    used = {name: getattr(sampling, name) for name in _RECOMMENDED}
    for name, asked in used.items():
        if asked is None:
            used[name] = getattr(config, name, None)
    last = getattr(config, "eos_token_id", None)
    try:
        _check_recommended(used)
        for token in last if isinstance(last, list) else [last]:
            if token is not None:
                # -1 is how some checkpoints write that there is none
                check("eos_token_id", token, int, least=-1, most=MOST)
        if sampling.temperature is None:
            sampled = getattr(config, "do_sample", None) or False
            check("do_sample", sampled, bool)
            if not sampled:
                used["temperature"] = 0.0
            elif used["temperature"] is None:
                used["temperature"] = 1.0
    except SettingError as error:
        raise FormatError(
            f"generation config of the model: {error}; correct generation_config.json, or remove it"
        ) from None
    if sampling.ignore_eos:
        last = None
    if used["temperature"] > 0:
        return GenerationConfig(do_sample=True, eos_token_id=last, **used)
    # the others would only cause warnings
    penalty = used["repetition_penalty"]
    return GenerationConfig(
        do_sample=False, eos_token_id=last, repetition_penalty=penalty
    )


def with_config(model: PreTrainedModel, config: GenerationConfig) -> PreTrainedModel:
    """The same model with another generation config: one that ``generate`` is given is completed from the model's own,
    which other threads read."""
    other = copy.copy(model)
    other.generation_config = config
    return other
