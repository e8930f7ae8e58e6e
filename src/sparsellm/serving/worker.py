"""One thread that generates, and the requests that wait for it."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm.errors import SparseLLMError
from sparsepack.decode import Decoder, decodes
from sparsepack.errors import SettingError, UserError
from sparsepack.generation import Answer, Batch, Generation, Sampling, complete
from sparsepack.module import threads_set
from sparsepack.native import MAX_TOKENS

CONTEXTS = 4  # that all answers in the making share


class UnavailableError(SparseLLMError):
    """The server cannot take or finish a request now."""


class GoneError(SparseLLMError):
    """The client is gone."""


class Job:
    """A request on its way through the worker: pieces of text come back, if it streams, then the result or an error.

    ``ids`` makes the prompt ``(1, tokens)``; ``limit`` is the most tokens of the answer, None for what has room."""

    def __init__(
        self,
        ids: Callable[[PreTrainedTokenizerBase], Tensor],
        sampling: Sampling,
        limit: int | None,
        *,
        streams: bool = True,
    ) -> None:
        self.ids = ids
        self.sampling = sampling
        self.limit = limit
        self.streams = streams
        self.cancelled = False
        self.answer: Answer | None = None  # once its prompt is known
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[str | Generation | Exception]()

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

    def cancel(self) -> None:
        """The answer is not wanted: it ends after the token in work."""
        self.cancelled = True
        self.send(GoneError("the client is gone"))


class Worker:
    """Runs jobs, first come, first served: at most ``context`` tokens of a prompt and its answer, ``max_tokens`` of an
    answer, and ``queue`` jobs that wait.

    The compiled decoder makes up to sixteen answers at once, with at most ``CONTEXTS`` times ``context`` tokens
    together, prompts and answers. Transformers makes one after another."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        max_tokens: int,
        queue: int,
        threads: int | None = None,
        log: Callable[[str], None],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._threads = threads
        self._log = log
        self._context = context
        self._max_tokens = max_tokens
        self._queue = queue
        self._running: list[Job] = []
        self._batch: Batch | None = None
        self._at_once = 1
        if decodes(model):
            self._at_once = MAX_TOKENS
            self._batch = Batch(Decoder(model, context, sequences=MAX_TOKENS))
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        # by time.monotonic(), when the running job is cancelled
        self._end: float | None = None
        self._counts = {"requests": 0, "cancelled": 0, "tokens": 0}
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job. UnavailableError: too many wait, or the server stops; SettingError: its limit is too high."""
        if job.limit is not None and job.limit > self._max_tokens:
            raise SettingError(
                f"max_tokens is {job.limit}; an answer has at most {self._max_tokens} tokens here"
            )
        with self._changed:
            if self._end is not None:
                raise UnavailableError("the server is stopping")
            self._waiting = deque(
                other for other in self._waiting if not other.cancelled
            )
            others = len(self._waiting) + len(self._running)
            if others >= self._queue + self._at_once:
                raise UnavailableError(
                    f"{len(self._running)} answers are being made, and {len(self._waiting)} requests wait; "
                    "try again later"
                )
            self._waiting.append(job)
            self._changed.notify()

    def stop(self, seconds: float) -> None:
        """Refuses what waits, and cancels what runs after this time; with 0 its client is answered at once."""
        with self._changed:
            self._end = min(self._end or math.inf, time.monotonic() + seconds)
            stopped = list(self._waiting)
            if not seconds:
                stopped += self._running
            for job in stopped:
                job.send(UnavailableError("the server is stopping"))
            self._waiting.clear()
            self._changed.notify()

    def ended(self, seconds: float) -> bool:
        """Whether the thread has ended, after at most this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def state(self) -> dict[str, object]:
        """What ``/health`` says: requests that run, wait, were begun and were cancelled, and tokens generated."""
        with self._changed:
            waiting = sum(not job.cancelled for job in self._waiting)
            running = len(self._running)
            status = "ok" if self._end is None else "stopping"
            return {
                "status": status,
                "running": running,
                "waiting": waiting,
                **self._counts,
            }

    def _wait(self) -> bool:
        """Whether there is something to do, once there is or the server stops."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._running or self._waiting or self._end is not None
            )
            return bool(self._running or self._waiting)

    def _next(self) -> Job | None:
        """The next job, which runs from now on; None if none waits, or the one that does has no room yet."""
        with self._changed:
            while self._waiting and self._waiting[0].cancelled:
                self._waiting.popleft()
            if not self._waiting or len(self._running) >= self._at_once:
                return None
            job = self._waiting[0]
            if job.answer is not None and not self._has_room(job.answer):
                return None
            self._waiting.popleft()
            self._running.append(job)
            self._counts["requests"] += job.answer is None
            return job

    def _has_room(self, answer: Answer) -> bool:
        tokens = 0
        if self._batch is not None:
            tokens = sum(other.room for other in self._batch.answers)
        return tokens + answer.room <= CONTEXTS * self._context

    def _work(self) -> None:
        with threads_set(self._threads):
            while self._wait():
                while (job := self._next()) is not None:
                    self._begin(job)
                if self._batch is not None and self._batch.answers:
                    self._step(self._batch)

    def _begin(self, job: Job) -> None:
        """Adds a job to the batch, or without one answers it; a job that has no room waits on, before the others."""
        try:
            if job.answer is None:
                job.answer = self._prepared(job)
            answer = job.answer
            if self._batch is None:
                complete(self._model, self._tokenizer, answer)
            elif self._has_room(answer):
                self._batch.join(answer)
                return
            else:
                with self._changed:
                    self._running.remove(job)
                    self._waiting.appendleft(job)
                return
        except BaseException as error:
            self._send(job, error)
        else:
            self._finish(job, answer)

    def _step(self, batch: Batch) -> None:
        try:
            ended = batch.step()
        except BaseException as error:
            ended = batch.fail(error)
        for job in list(self._running):
            if job.answer in ended:
                self._finish(job, job.answer)

    def _finish(self, job: Job, answer: Answer) -> None:
        """Counts an answer that ended, and sends it."""
        try:
            result = answer.result()
        except BaseException as error:
            self._send(job, error)
            return
        with self._changed:
            self._counts["tokens"] += result.new_tokens
            self._counts["cancelled"] += result.finish == "cancelled"
        self._log(
            f"{result.prompt_tokens} tokens read in {result.prefill_seconds:.2f} s, {result.new_tokens} generated "
            f"({result.tokens_per_second:.1f} tokens/s), {result.finish}"
        )
        if result.finish == "cancelled":
            self._send(job, UnavailableError("the server is stopping"))
        else:
            self._send(job, result)

    def _send(self, job: Job, event: Generation | BaseException) -> None:
        """Ends a job. No memory, or a PanicException of a tokenizer, is for the log: the next request may work."""
        if isinstance(event, BaseException) and not isinstance(
            event, UserError | SparseLLMError
        ):
            logging.getLogger(__name__).error("a request failed", exc_info=event)
            event = SparseLLMError(
                f"the server failed ({type(event).__name__}); its log says why"
            )
        # before the answer: whoever gets it may ask again at once
        with self._changed:
            self._running.remove(job)
        job.send(event)

    def _prepared(self, job: Job) -> Answer:
        """The answer of a job, not yet begun. A SettingError says that prompt and answer are too long."""
        ids = job.ids(self._tokenizer)
        tokens = ids.shape[1]
        context = self._context
        if job.limit is None:
            limit = min(self._max_tokens, context - tokens)
        else:
            limit = job.limit
        if tokens + limit > context or limit < 1:
            more = ""
            if limit > 0:
                more = f" and {limit} are to follow"
            raise SettingError(
                f"the prompt has {tokens} tokens{more}; prompt and answer have at most {context} here"
            )
        return Answer(
            self._model,
            self._tokenizer,
            ids,
            replace(job.sampling, max_new_tokens=limit),
            # each piece wakes the loop, which costs as much as choosing a token
            on_text=job.send if job.streams else None,
            cancelled=lambda: (
                job.cancelled
                or (self._end is not None and time.monotonic() > self._end)
            ),
        )
