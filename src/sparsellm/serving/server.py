"""The HTTP server: OpenAI's routes, who may call them, and how it starts and stops."""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparsellm import interrupts
from sparsellm.errors import DataError, ModelError, RecipeError, shown
from sparsellm.serving.connections import BACKLOG, Connection, one_line_handler
from sparsellm.serving.prompts import open_model
from sparsellm.serving.protocol import (
    Answer,
    Asked,
    ChatRequest,
    CompletionRequest,
    error,
)
from sparsellm.serving.worker import GoneError, Job, UnavailableError, Worker
from sparsepack.decode import decodes
from sparsepack.errors import SettingError, UserError
from sparsepack.files import context_limit, read_bytes
from sparsepack.generation import Generation

KEY = "SPARSELLM_API_KEY"  # in the environment
MOST_CONTEXT = 8192  # tokens, unless more is asked for: a longer prompt keeps all others waiting for minutes
GRACE = 5.0  # seconds that a running request has to end when the server stops


class ServerSettings(BaseModel):
    """What the server listens to and where its limits are."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    key_file: Path | None = None
    name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] = 2048
    context: Annotated[int, Field(ge=2, lt=1 << 31)] | None = None
    queue: Annotated[int, Field(ge=0, le=10_000)] = 16
    max_body: Annotated[int, Field(ge=1, le=1 << 30)] = 1 << 20
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    quiet: bool = False


def open_door(settings: ServerSettings) -> tuple[socket.socket, str | None]:
    """A listening socket, so that a busy port is known before the model is loaded, and the key that clients must send,
    or None. RecipeError: the port cannot be used, other machines can reach it without a key, or the key is bad."""
    key = _key(settings.key_file)
    host = settings.host
    port = settings.port
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if key is None and not ipaddress.ip_address(address[0]).is_loopback:
            raise RecipeError(
                f"--host {host} accepts requests from other machines, which needs a key; set {KEY}, "
                "or give --key-file FILE"
            )
        listening = socket.create_server(address, family=family)
    except (OSError, UnicodeError) as failed:
        busy = isinstance(failed, OSError) and failed.errno == errno.EADDRINUSE
        why = f"not available: {getattr(failed, 'strerror', failed)}"
        if busy:
            why = "in use; stop what listens there, or give another --port"
        elif isinstance(failed, socket.gaierror):
            why = f"not available, because this name is unknown ({failed.strerror}); give --host 127.0.0.1"
        raise RecipeError(f"port {port} of {host!r:.100} is {why}") from None
    return listening, key


def _key(file: Path | None) -> str | None:
    """The key that clients send; None if none is set. It is never in the command line, which all users can read."""
    given = os.environ.get(KEY)
    where = KEY
    if file is not None:
        if given is not None:
            raise RecipeError(
                f"both {KEY} and --key-file {file} give a key; give one of them"
            )
        try:
            read = read_bytes(file.expanduser(), 4096, RecipeError, pipe=True)
        except (RecipeError, RuntimeError) as failed:  # RuntimeError: no such user
            raise RecipeError(
                f"--key-file: {failed}; check the path, or leave it out"
            ) from None
        given = read.decode("ascii", "replace").strip()
        where = f"--key-file {file}"
    fits = given is None or (
        0 < len(given) <= 4096
        and given.isascii()
        and given.isprintable()
        and " " not in given
    )
    if not fits:
        raise RecipeError(
            f"the key in {where} is empty or more than one word of ASCII; write one, such as 32 letters"
        )
    return given


def _ignore(_: str) -> None:
    """Does nothing with a line."""


def serve(
    directory: str,
    settings: ServerSettings,
    options: dict[str, str],
    log: Callable[[str], None],
) -> None:
    """Serves a checkpoint until a signal stops it. ``options`` are those of :func:`sparsepack.loading.load`; ``log``
    gets a line at the start, and unless quiet one for each request."""
    listening, key = open_door(settings)
    with listening:
        host, port = listening.getsockname()[:2]
        model, tokenizer = open_model(directory, options)
        limit = context_limit(model.config)
        context = settings.context or min(limit or MOST_CONTEXT, MOST_CONTEXT)
        if limit is not None and context > limit:
            raise ModelError(
                f"--context is {context}, and the model takes {limit} tokens"
            )
        limits = {
            "context": context,
            "max_tokens": settings.max_tokens,
            "queue": settings.queue,
        }
        told = _ignore if settings.quiet else log
        worker = Worker(model, tokenizer, **limits, threads=settings.threads, log=told)
        name = settings.name or Path(directory).expanduser().resolve().name
        config = uvicorn.Config(
            _Gate(application(worker, name), key, settings.max_body),
            http=Connection,
            backlog=BACKLOG,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=int(GRACE) + 2,  # the worker cancels before
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        log(
            f"{name} listens at {url}, {'with' if key else 'without'} a key; Ctrl-C stops it"
        )
        log(
            f"{context} tokens of context, decoded by {'the compiled decoder' if decodes(model) else 'transformers'}"
        )
        _Server(config, worker, log).run(sockets=[listening])
    worker.stop(0)
    # it reads a long prompt; the interpreter must not end under a thread that computes
    if not worker.ended(GRACE):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, worker: Worker, log: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._worker = worker
        self._log = log

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops gracefully by every signal of the command line; uvicorn's own would raise it again afterwards."""
        with interrupts.handled_by(self.handle_exit):
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(one_line_handler(self._log))
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop(GRACE)
        asyncio.get_running_loop().call_later(GRACE, self._worker.stop, 0)
        await super().shutdown(sockets)


class _Gate:
    """Refuses requests without the key, of web pages that a browser has open, and with a body that is too large."""

    def __init__(self, app: ASGIApp, key: str | None, most: int) -> None:
        self._app = app
        self._most = most
        self._key = None
        if key is not None:
            self._key = f"bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refused = self._refused(Headers(scope=scope), scope["path"])
        parts = []
        read = 0
        more = True
        # a client that still sends would lose the answer when the connection closes
        while more and read < 16 * self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            more = message.get("more_body", False)
            read += len(message.get("body", b""))
            if read <= self._most:
                parts.append(message.get("body", b""))
        if refused is None and read > self._most:
            refused = _problem(
                413, f"the body is too large; at most {self._most} bytes are read"
            )
        if refused is not None:
            await refused(scope, receive, send)
            return
        read_once = iter([{"type": "http.request", "body": b"".join(parts)}])

        async def whole() -> Message:
            return next(read_once, None) or await receive()

        await self._app(scope, whole, send)

    def _refused(self, headers: Headers, path: str) -> JSONResponse | None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = f"{scheme.lower()} {key.strip()}".encode("latin-1")
        if (
            self._key is not None
            and path != "/health"
            and not hmac.compare_digest(given, self._key)
        ):
            return _problem(
                401, "the API key is missing or wrong", code="invalid_api_key"
            )
        if self._key is None and not _is_local(headers.get("host", "")):
            return _problem(
                400,
                f"the host {shown(headers.get('host'))} is not localhost; set {KEY} to allow others",
            )
        return None


def _is_local(host: str) -> bool:
    """Whether a Host header is ``localhost`` or an address; web pages that call this machine have other names."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _problem(
    status: int,
    message: str,
    headers: Mapping[str, str] | None = None,
    **parts: str | None,
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 503:
        headers = {"Retry-After": "1"}
    return JSONResponse(error(message, kind, **parts), status, headers)


async def _of_error(_: Request, failed: Exception) -> Response:
    status = 500
    if isinstance(failed, SettingError | DataError | ModelError):
        status = 400
    if isinstance(failed, UnavailableError):
        status = 503
    return _problem(status, str(failed))


async def _of_status(_: Request, failed: HTTPException) -> Response:
    return _problem(failed.status_code, str(failed.detail), failed.headers)


async def _of_validation(_: Request, failed: RequestValidationError) -> Response:
    """Names the first value of a body that is refused."""
    first = failed.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    kind = first["type"]
    if kind == "json_invalid":
        return _problem(
            400,
            f"the body is not JSON: {first.get('ctx', {}).get('error', '')}, at character {place}",
        )
    if kind == "unsupported":
        return _problem(400, first["msg"], param=first["ctx"]["name"])
    if not place:
        return _problem(
            400, "the body is not a JSON object with Content-Type: application/json"
        )
    if kind == "missing":
        why = "is missing"
    else:
        reason = (
            first["msg"]
            .removeprefix("Value error, ")
            .replace("Input should", "it should")
        )
        why = f"is {shown(first['input'])}: {reason}"
    return _problem(400, f"{place} {why}", param=place)


def application(worker: Worker, name: str) -> FastAPI:
    """The routes; ``name`` is that of the model."""
    handlers = {
        UserError: _of_error,
        HTTPException: _of_status,
        RequestValidationError: _of_validation,
    }
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers=handlers,  # type: ignore[arg-type]
    )
    card = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sparsellm",
    }

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def _health() -> Response:
        return JSONResponse({"model": name, **worker.state()})

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    async def _models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.api_route("/v1/models/{asked:path}", methods=["GET", "HEAD"])
    async def _model(asked: str) -> Response:
        return JSONResponse(card) if asked == name else unknown(asked)

    def unknown(asked: str) -> Response:
        return _problem(
            404,
            f"model is {shown(asked)}; this server has {name!r}",
            code="model_not_found",
        )

    async def answer(asked: Asked, request: Request) -> Response:
        if asked.model not in (None, name):
            return unknown(asked.model)
        job = Job(asked.ids, asked.sampling(), asked.max_tokens, streams=asked.stream)
        made = Answer(asked, name)
        worker.submit(job)
        events = _events(job, request)
        try:
            # what the prompt is refused for comes before a stream begins
            event = await anext(events)
            if asked.stream:
                return StreamingResponse(
                    _stream(event, events, made), media_type="text/event-stream"
                )
        except GoneError:
            return Response(status_code=499)
        assert isinstance(event, Generation)
        return JSONResponse(made.whole(event))

    @app.post("/v1/chat/completions")
    async def _chat(asked: ChatRequest, request: Request) -> Response:
        return await answer(asked, request)

    @app.post("/v1/completions")
    async def _completions(asked: CompletionRequest, request: Request) -> Response:
        return await answer(asked, request)

    return app


async def _events(job: Job, request: Request) -> AsyncIterator[str | Generation]:
    """Pieces of text, and the result last. The job is cancelled when nobody reads on, or the client is gone."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watching = asyncio.create_task(watch())
    try:
        event: str | Generation = ""
        while isinstance(event, str):
            event = await job.event()
            yield event
    finally:
        watching.cancel()
        job.cancel()


async def _stream(
    event: str | Generation, events: AsyncIterator[str | Generation], made: Answer
) -> AsyncIterator[str]:
    """An answer as server-sent events."""
    try:
        yield _sent(made.first())
        while isinstance(event, str):
            yield _sent(made.piece(event))
            event = await anext(events)
        for content in made.last(event):
            yield _sent(content)
        yield "data: [DONE]\n\n"
    except GoneError:
        return
    except UserError as failed:
        yield _sent(error(str(failed), "server_error"))


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
