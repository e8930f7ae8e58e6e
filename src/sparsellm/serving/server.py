"""The HTTP server: OpenAI's routes, who may call them, and how it starts and stops."""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sparsellm import interrupts
from sparsellm.errors import ModelError, RecipeError, shown
from sparsellm.serving.connections import BACKLOG, Connection, one_line_handler
from sparsellm.serving.prompts import open_model
from sparsellm.serving.protocol import Asked, FieldError, blamed_on, error_body
from sparsellm.serving.worker import UnavailableError, Worker
from sparsepack.decode import decodes
from sparsepack.errors import SettingError, UserError
from sparsepack.files import context_limit, read_bytes
from sparsepack.generation import Generation

KEY = "SPARSELLM_API_KEY"  # in the environment
MOST_CONTEXT = 8192  # tokens, unless more is asked for: a longer prompt keeps all others waiting for minutes
JSON = "application/json"
_STARTED = int(time.time())
GRACE = 5.0  # seconds that a running request has to end when the server stops
# what a client gets for our errors; others are 500
_STATUS = {FieldError: 400, SettingError: 400, UnavailableError: 503}
_COMPLETIONS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class _Refused(Exception):  # noqa: N818 - it is an answer, and no mistake of ours
    """A request that is refused: the status and what the client is told. If there are any, OpenAI's code of it, the
    field that is wrong, and the methods that are right."""

    status: int
    message: str
    code: str | None = None
    field: str | None = None
    allowed: str | None = None


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
        why = f"not available: {getattr(failed, 'strerror', failed)}"
        if isinstance(failed, socket.gaierror):
            why = f"not available, because this name is unknown ({failed.strerror}); give --host 127.0.0.1"
        elif isinstance(failed, OSError) and failed.errno == errno.EADDRINUSE:
            why = "in use; stop what listens there, or give another --port"
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
    if given is not None and not re.fullmatch("[!-~]{1,4096}", given):
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
    """Serves a checkpoint until a signal stops it. ``options`` are those of ``sparsepack.loading.load``; ``log``
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
        worker = Worker(
            model,
            tokenizer,
            context=context,
            max_tokens=settings.max_tokens,
            queue=settings.queue,
            threads=settings.threads,
            log=_ignore if settings.quiet else log,
        )
        name = settings.name or Path(directory).expanduser().resolve().name
        config = uvicorn.Config(
            Application(worker, name, key, most=settings.max_body),
            ws="none",
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
        _Server(config, worker).run(sockets=[listening])
    worker.stop(0)
    # it reads a long prompt; the interpreter must not end under a thread that computes
    if not worker.ended(GRACE):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops gracefully by every signal of the command line; uvicorn's own would raise it again afterwards."""
        handler = one_line_handler(logging.getLogger(__name__).error)
        asyncio.get_running_loop().set_exception_handler(handler)
        with interrupts.handled_by(self.handle_exit):
            yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop(GRACE)
        await super().shutdown(sockets)


@dataclass
class Application:
    """OpenAI's routes, for those who may call them.

    Attributes:
        worker: answers.
        name: that of the model.
        key: what clients must send; None for programs of this machine alone.
        most: the bytes of a body.
    """

    worker: Worker
    name: str
    key: str | None
    most: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, as long as its client is there."""
        request = Request(scope, receive)
        body = bytearray()
        read = 0
        try:
            # a client that still sends would lose the answer when the connection closes
            async for part in request.stream():
                read += len(part)
                if len(body) <= self.most:
                    body += part
                if read >= 16 * self.most:
                    break
        except ClientDisconnect:
            return
        answering = asyncio.create_task(self._answer(request, body, send))
        watching = asyncio.create_task(_gone(receive))
        watching.add_done_callback(lambda _: answering.cancel())
        with suppress(asyncio.CancelledError):
            await answering
        watching.cancel()

    async def _answer(self, request: Request, body: bytearray, send: Send) -> None:
        try:
            self._check_sender(request)
            response = await self._response(request, body)
        except (_Refused, UserError) as failed:
            response = _refusal(failed)
        await response(request.scope, request.receive, send)

    def _check_sender(self, request: Request) -> None:
        """Refuses those without the key, and web pages that a browser has open."""
        if self.key is None:
            host = request.headers.get("host", "")
            if not _is_local(host):
                raise _Refused(
                    400,
                    f"the host {shown(host)} is not localhost; set {KEY} to allow others",
                )
        elif request.scope["path"] != "/health":
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            given = f"{scheme.lower()} {key.strip()}".encode("latin-1")
            if not hmac.compare_digest(given, f"bearer {self.key}".encode()):
                raise _Refused(
                    401, "the API key is missing or wrong", code="invalid_api_key"
                )

    async def _response(self, request: Request, body: bytearray) -> Response:
        if len(body) > self.most:
            raise _Refused(
                413, f"the body is too large; at most {self.most} bytes are read"
            )
        path = request.scope["path"]
        if path in _COMPLETIONS:
            _check_method(request.method, "POST")
            # what a web page may send without asking has another type
            kind = request.headers.get("content-type", "").lower()
            if not kind.startswith(JSON):
                raise SettingError(f"the body has no Content-Type: {JSON}")
            return await self._made(Asked(body, self.name, chat="chat" in path))
        card = {
            "id": self.name,
            "object": "model",
            "created": _STARTED,
            "owned_by": "sparsellm",
        }
        answer: dict[str, Any] = card
        if path == "/health":
            answer = {"model": self.name, **self.worker.state()}
        elif path == "/v1/models":
            answer = {"object": "list", "data": [card]}
        elif path.startswith("/v1/models/"):
            self._check_name(path.removeprefix("/v1/models/"))
        else:
            raise _Refused(404, "Not Found")
        _check_method(request.method, "GET", "HEAD")
        return JSONResponse(answer)

    def _check_name(self, asked: object) -> None:
        if asked != self.name:
            raise _Refused(
                404,
                f"model is {shown(asked)}; this server has {self.name!r}",
                code="model_not_found",
                field="model",
            )

    async def _made(self, asked: Asked) -> Response:
        self._check_name(asked.model)
        with blamed_on(asked.limit_field):
            self.worker.submit(asked)
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self.worker.cancel(asked))
        # what the prompt is refused for comes before a stream begins
        with blamed_on(asked.prompt_field):
            event = await asked.event()
        if isinstance(event, Generation) and not asked.streams:
            return JSONResponse(asked.whole(event))
        return StreamingResponse(_stream(asked, event), media_type="text/event-stream")


async def _gone(receive: Receive) -> None:
    """Waits until the client is gone; what it still sends is not read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(asked: Asked, event: str | Generation) -> AsyncIterator[str]:
    """An answer as server-sent events, from its first one on."""
    try:
        # the role only once, since clients join the values of all pieces
        yield _sent(asked.piece({"role": "assistant", "content": ""}))
        while isinstance(event, str):
            yield _sent(asked.piece({"content": event}))
            event = await asked.event()
        yield _sent(asked.piece({}, event.finish))
        if asked.counts:
            yield _sent(asked.totals(event))
        yield "data: [DONE]\n\n"
    except UserError as failed:
        yield _sent(error_body(str(failed), "server_error"))


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _refusal(failed: _Refused | UserError) -> Response:
    if isinstance(failed, UserError):
        field = failed.field if isinstance(failed, FieldError) else None
        status = _STATUS.get(type(failed), 500)
        failed = _Refused(status, str(failed), field=field)
    kind = "invalid_request_error"
    if failed.status >= 500:
        kind = "server_error"
    headers = {}
    if failed.status == 503:
        headers["Retry-After"] = "1"
    if failed.allowed is not None:
        headers["Allow"] = failed.allowed
    error = error_body(failed.message, kind, field=failed.field, code=failed.code)
    return JSONResponse(error, failed.status, headers)


def _check_method(method: str, *allowed: str) -> None:
    if method not in allowed:
        right = ", ".join(allowed)
        raise _Refused(
            405,
            f"the method is {shown(method)}; this path takes {right}",
            code="method_not_supported",
            allowed=right,
        )


def _is_local(host: str) -> bool:
    """Whether a Host header is ``localhost`` or an address; web pages that call this machine have other names."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
