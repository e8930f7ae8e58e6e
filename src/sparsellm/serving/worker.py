"""One thread that generates, and the requests that wait for it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm.errors import SparseLLMError
from sparsepack.decode import Decoder, decodes
from sparsepack.errors import SettingError, UserError
from sparsepack.generation import Answer, Batch, Generation, Sampling
from sparsepack.module import threads_set
from sparsepack.native import MAX_TOKENS

CONTEXTS = 4  # that all answers in the making share


class UnavailableError(SparseLLMError):
    """The server cannot take or finish a request now."""


@dataclass(eq=False)
class Job:
    """A request on its way through the worker: pieces of text come back, if it streams, then the result or an error.

    Attributes:
        ids: makes the prompt ``(1, tokens)``.
        limit: the most tokens of the answer; None for what has room.
        answer: what is made of it, once its prompt is known.
        cancelled: whether nobody waits for it; it ends after the token in work.
    """

    ids: Callable[[PreTrainedTokenizerBase], Tensor]
    sampling: Sampling
    limit: int | None
    streams: bool = True
    answer: Answer | None = None
    cancelled: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue[str | Generation | Exception] = field(
        default_factory=asyncio.Queue
    )

    async def event(self) -> str | Generation:
        """The next piece of text, or the result. What went wrong is raised."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def send(self, event: str | Generation | Exception) -> None:
        """Called by any thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


@dataclass(eq=False)
class Worker:
    """Runs jobs, first come, first served.

    The compiled decoder makes up to sixteen answers at once, with at most ``CONTEXTS`` times ``context`` tokens
    together, prompts and answers. Transformers makes one after another.

    Attributes:
        context: the most tokens of a prompt and its answer.
        max_tokens: those of an answer.
        queue: the most jobs that wait.
        threads: CPU threads; None for the current setting of torch.
        log: gets a line for each answer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    context: int
    max_tokens: int
    queue: int
    threads: int | None = None
    log: Callable[[str], None]

    def __post_init__(self) -> None:
        self._at_once = 1
        decoder = None
        if decodes(self.model):
            self._at_once = MAX_TOKENS
            decoder = Decoder(self.model, self.context, sequences=MAX_TOKENS)
        self._batch = Batch(decoder)
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._stopping = False
        self._counts = {"requests": 0, "cancelled": 0, "tokens": 0}
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job. UnavailableError: too many wait, or the server stops; SettingError: its limit is too high."""
        if job.limit is not None and job.limit > self.max_tokens:
            raise SettingError(
                f"max_tokens is {job.limit}; an answer has at most {self.max_tokens} tokens here"
            )
        with self._changed:
            running = len(self._running)
            waiting = len(self._waiting)
            if self._stopping:
                raise UnavailableError("the server is stopping")
            if running + waiting >= self._at_once + self.queue:
                raise UnavailableError(
                    f"{running} answers are being made, and {waiting} requests wait; try again later"
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job: it ends after the token in work, or at once if it waits."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self, seconds: float) -> None:
        """Refuses what waits, and cancels what runs after this time; with 0 its client is answered at once."""
        with self._changed:
            self._stopping = True
            stopped = list(self._waiting)
            if not seconds:
                stopped += self._running
            for job in stopped:
                job.send(UnavailableError("the server is stopping"))
                self.cancel(job)
            self._changed.notify()
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self.stop, 0)

    def ended(self, seconds: float) -> bool:
        """Whether the thread has ended, after at most this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def state(self) -> dict[str, object]:
        """What ``/health`` says: requests that run, wait, were begun and were cancelled, and tokens generated."""
        with self._changed:
            return {
                "status": "stopping" if self._stopping else "ok",
                "running": len(self._running),
                "waiting": len(self._waiting),
                **self._counts,
            }

    def _work(self) -> None:
        with threads_set(self.threads):
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._running or self._waiting or self._stopping
                    )
                    if not self._running and not self._waiting:
                        return
                while self._begin():
                    pass
                self._batch.step()
                for job in list(self._running):
                    if job.answer is not None and job.answer.ended:
                        self._end(job, job.answer.failed)

    def _begin(self) -> bool:
        """Whether the first job that waits has begun, or has ended; not if none waits, or it has no room yet."""
        with self._changed:
            if not self._waiting or len(self._running) == self._at_once:
                return False
            job = self._waiting[0]
        try:
            if job.answer is None:
                job.answer = self._prepared(job)
            rooms = [answer.room for answer in (*self._batch.answers, job.answer)]
            if sum(rooms) > CONTEXTS * self.context:
                return False
            with self._changed:
                if job.cancelled:
                    return True
                self._waiting.remove(job)
                self._running.add(job)
            self._batch.join(job.answer)
        except BaseException as error:
            self._end(job, error)
        return True

    def _prepared(self, job: Job) -> Answer:
        """The answer of a job, not yet begun. A SettingError says that prompt and answer are too long."""
        self._counts["requests"] += 1
        ids = job.ids(self.tokenizer)
        tokens = ids.shape[1]
        limit = job.limit
        if limit is None:
            limit = max(1, min(self.max_tokens, self.context - tokens))
        if tokens + limit > self.context:
            raise SettingError(
                f"the prompt has {tokens} tokens and {limit} are to follow; prompt and answer have at most "
                f"{self.context} here"
            )
        return Answer(
            self.model,
            self.tokenizer,
            ids,
            replace(job.sampling, max_new_tokens=limit),
            # each piece wakes the loop, which costs as much as choosing a token
            on_text=job.send if job.streams else None,
            cancelled=lambda: job.cancelled,
        )

    def _end(self, job: Job, failed: BaseException | None) -> None:
        """Sends the result of a job, or why there is none. No memory, or a PanicException of a tokenizer, is for the
        log: the next request may work."""
        event: Generation | UserError
        try:
            if failed is not None:
                raise failed
            assert job.answer is not None
            event = job.answer.result()
            self._counts["tokens"] += event.new_tokens
            self._counts["cancelled"] += event.finish == "cancelled"
            self.log(
                f"{event.prompt_tokens} tokens read in {event.prefill_seconds:.2f} s, {event.new_tokens} generated "
                f"({event.tokens_per_second:.1f} tokens/s), {event.finish}"
            )
        except UserError as error:
            event = error
        except BaseException as error:
            logging.getLogger(__name__).error("a request failed", exc_info=error)
            event = SparseLLMError(
                f"the server failed ({type(error).__name__}); its log says why"
            )
        # before the answer: whoever gets it may ask again at once
        with self._changed:
            self._running.discard(job)
            self.cancel(job)
        job.send(event)
