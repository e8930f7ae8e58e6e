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
from sparsepack.errors import SettingError, UserError
from sparsepack.generation import Generation, Sampling, continuation


class UnavailableError(SparseLLMError):
    """The server cannot take or finish a request now."""


class GoneError(SparseLLMError):
    """The client is gone."""


class Job:
    """A request on its way through the worker: pieces of text come back, then the result or an error.

    ``ids`` makes the prompt ``(1, tokens)``; ``limit`` is the most tokens of the answer, None for what has room."""

    def __init__(
        self,
        ids: Callable[[PreTrainedTokenizerBase], Tensor],
        sampling: Sampling,
        limit: int | None,
    ) -> None:
        self.ids = ids
        self.sampling = sampling
        self.limit = limit
        self.cancelled = False
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
    """Runs one job after another, first come, first served: at most ``context`` tokens of a prompt and its answer,
    ``max_tokens`` of an answer, and ``queue`` jobs that wait."""

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
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._waiting = deque[Job]()
        self._end: float | None = (
            None  # by time.monotonic(), when the running job is cancelled
        )
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
            if len(self._waiting) + (self._running is not None) > self._queue:
                raise UnavailableError(
                    f"an answer is being made, and {self._queue} requests wait; try again later"
                )
            self._waiting.append(job)
            self._changed.notify()

    def stop(self, seconds: float) -> None:
        """Refuses what waits, and cancels what runs after this time; with 0 its client is answered at once."""
        with self._changed:
            self._end = min(self._end or math.inf, time.monotonic() + seconds)
            stopped = list(self._waiting)
            if self._running and not seconds:
                stopped.append(self._running)
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
            running = int(self._running is not None)
            status = "ok" if self._end is None else "stopping"
            return {
                "status": status,
                "running": running,
                "waiting": waiting,
                **self._counts,
            }

    def _next(self) -> Job | None:
        """The next job, once there is one; None when the server stops."""
        with self._changed:
            while (
                self._changed.wait_for(lambda: self._waiting or self._end is not None)
                and self._waiting
            ):
                if not (job := self._waiting.popleft()).cancelled:
                    self._running = job
                    self._counts["requests"] += 1
                    return job
            return None

    def _work(self) -> None:
        while (job := self._next()) is not None:
            answer: Generation | Exception
            try:
                answer = self._run(job)
            except UserError as error:
                answer = error
            except BaseException as error:  # no memory, or a PanicException of a tokenizer: the next request may work
                logging.getLogger(__name__).exception("a request failed")
                answer = SparseLLMError(
                    f"the server failed ({type(error).__name__}); its log says why"
                )
            # before the answer: whoever gets it may ask again at once
            with self._changed:
                self._running = None
            job.send(answer)

    def _run(self, job: Job) -> Generation:
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
        result = continuation(
            self._model,
            self._tokenizer,
            ids,
            replace(job.sampling, max_new_tokens=limit),
            threads=self._threads,
            on_text=job.send,
            cancelled=lambda: (
                job.cancelled
                or (self._end is not None and time.monotonic() > self._end)
            ),
        )
        with self._changed:
            self._counts["tokens"] += result.new_tokens
            self._counts["cancelled"] += result.finish == "cancelled"
        self._log(
            f"{result.prompt_tokens} tokens read in {result.prefill_seconds:.2f} s, {result.new_tokens} generated "
            f"({result.tokens_per_second:.1f} tokens/s), {result.finish}"
        )
        if result.finish == "cancelled":
            raise UnavailableError("the server is stopping")
        return result
