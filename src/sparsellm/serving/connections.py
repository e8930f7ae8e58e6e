"""Connections of clients: as many as there is room for, each with a time in which it must send a whole request."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sparsellm.errors import one_line
from sparsellm.serving.protocol import error_body

REQUEST_SECONDS = 20.0  # from the first byte of a request to its last
MOST_CONNECTIONS = 100
# Connections that are accepted before the first of them is counted
BACKLOG = 32
_OTHER_FILES = 64  # descriptors that the server needs for other things
_SILENT = 10.0  # seconds between two lines about errors of connections


def most_connections() -> int:
    """The connections that are open at a time, by the limit of descriptors of this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(4, min(MOST_CONNECTIONS, (limit - _OTHER_FILES) // 2))


class Connection(H11Protocol):
    """A connection. It is closed if a request is not complete in ``REQUEST_SECONDS``. When there are too many, the
    one that has waited longest for its client is closed, so that silent clients keep nobody out."""

    _late: asyncio.TimerHandle

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # else the last part of an answer waits for the client's receipt of the first
        transport.get_extra_info("socket").setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )
        self._await_client()
        if len(self.connections) > most_connections():
            others = (other for other in self.connections if other is not self)
            waiting = [
                other
                for other in others
                if isinstance(other, Connection) and other.waits
            ]
            oldest = min(waiting, key=lambda other: other._late.when(), default=self)
            oldest.transport.abort()
            self.connections.discard(oldest)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.waits:
            self._late.cancel()
        elif self._late.cancelled() and not self.transport.is_closing():
            self._await_client()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP as the other refusals, with the reason that h11 gives, and closes."""
        why = sys.exception()
        status = HTTPStatus.BAD_REQUEST
        if isinstance(why, h11.RemoteProtocolError):
            # after this h11 repeats the line, which may be long and hold the key
            reason = str(why).partition(": bytearray(")[0]
            msg = f"the request is not valid HTTP: {reason}"
            # h11's others, such as 501 for an unknown encoding, blame the server
            if why.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
                status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(msg, "invalid_request_error")).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            head = h11.Response(
                status_code=status, headers=headers, reason=status.phrase
            )
            for part in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        # else the answer has begun, and cannot become another
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    @property
    def waits(self) -> bool:
        """Whether the next thing to happen is that the client sends something."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    def _await_client(self) -> None:
        self._late = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)


def one_line_handler(
    log: Callable[[str], None],
) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """A handler of a loop's exceptions that logs a line, and nothing for some time after it."""
    last = -_SILENT

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last < _SILENT:
            return
        last = time.monotonic()
        error = context.get("exception")
        why = f" ({one_line(error)})" if error is not None else ""
        log(f"a connection failed: {context.get('message')}{why}")

    return handle
