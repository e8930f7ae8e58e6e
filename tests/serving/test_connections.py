"""Connections whose clients are silent, slow or many."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from sparsellm.serving import connections
from sparsellm.serving.connections import Connection, one_line_handler
from tests.serving.process import KEY, serving

WHOLE = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = b"GET / HTTP/1.1\r\nHo"
HALF_BODY = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body, in two messages."""
    size = 0
    while (message := await receive()).get("more_body"):
        size += len(message["body"])
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"%d" % size})


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[int, ServerState]]:
    """The port of a server of :func:`app`, and its connections."""
    state = ServerState()
    config = uvicorn.Config(app, lifespan="off", ws="none")
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as opened:
        made = await loop.create_server(
            lambda: Connection(config, state, {}), sock=opened
        )
        async with made:
            yield opened.getsockname()[1], state


async def ask(port: int, *parts: bytes) -> tuple[Any, Any]:
    """A connection to which these bytes were sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
        await writer.drain()
    return reader, writer


@pytest.mark.parametrize("sent", [b"", HALF, HALF_BODY, WHOLE + HALF])
def test_half_a_request_ends_the_connection(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)

    async def run() -> None:
        async with listening() as (port, state):
            reader, writer = await ask(port, sent)
            answer = await asyncio.wait_for(reader.read(), 20)
            assert answer.startswith(b"HTTP/1.1 200") == sent.startswith(WHOLE)
            writer.close()
            assert not state.connections

    asyncio.run(run())


def test_silent_clients_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 4)

    async def run() -> None:
        async with listening() as (port, state):
            silent = [await ask(port, HALF) for _ in range(12)]
            reader, writer = await ask(port, WHOLE)
            assert await reader.readuntil(b"\r\n") == b"HTTP/1.1 200 OK\r\n"
            assert len(state.connections) <= 4
            for _, other in (*silent, (reader, writer)):
                other.close()

    asyncio.run(run())


def test_an_answer_waits_for_no_receipt() -> None:
    async def run() -> None:
        async with listening() as (port, state):
            reader, writer = await ask(port, WHOLE)
            await reader.readuntil(b"\r\n")
            (connection,) = state.connections
            opened = connection.transport.get_extra_info("socket")
            assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()

    asyncio.run(run())


def test_the_cap_leaves_descriptors_for_other_things(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit, most in ((1024, 100), (256, 96), (32, 4), (-1, 100)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=limit: (soft, soft))
        assert connections.most_connections() == most


def test_errors_of_connections_are_one_line() -> None:
    lines: list[str] = []
    handle = one_line_handler(lines.append)
    full = OSError(errno.EMFILE, "Too many open files")
    loop = asyncio.new_event_loop()
    for _ in range(1000):
        handle(loop, {"message": "socket.accept() failed", "exception": full})
    loop.close()
    (line,) = lines
    assert line.startswith("a connection failed: socket.accept() failed (OSError: ")


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of another process")
def test_three_hundred_silent_clients_at_256_descriptors(packed: Path) -> None:
    with serving(packed, "--quiet", SPARSELLM_API_KEY=KEY) as (process, url):
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (256, 256))
        address = url.removeprefix("http://").removesuffix("/v1").split(":")
        silent = [
            socket.create_connection((address[0], int(address[1])), timeout=20)
            for _ in range(300)
        ]
        for connection in silent:
            connection.send(HALF)
        health = httpx.get(url.removesuffix("v1") + "health", timeout=20)
        assert health.status_code == 200
        for connection in silent:
            connection.close()
        process.kill()
        assert process.stderr is not None
        told = process.stderr.read()
    assert "Traceback" not in told
    assert len(told.splitlines()) < 20
