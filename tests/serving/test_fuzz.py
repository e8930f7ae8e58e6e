"""A hundred bad requests, drawn with a seed: each is answered in OpenAI's shape, and the server works on."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.process import KEY, serving

MOST = 4000  # bytes of a body
CONTEXT = 512
PROMPT = "The while statement"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PATHS = (COMPLETIONS, CHAT, "/v1/models", "/v1/models/tiny", "/health", "/metrics")
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD")
FIELDS = (
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream"),
    *("stream_options", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty", "ignore_eos"),
    *("n", "tools", "logprobs", "logit_bias", "response_format", "no_such_field"),
)
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**64, 10**300),
    *(float("nan"), float("-inf"), "", "1", "\ud800", "\0", "é\u202e👩‍👩‍👧", "x" * 900),
    *([], {}, [[]], [None], [1] * 500, ["a"] * 300, [PROMPT], {"": {}}, {"a": [1]}),
    *([{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]),
    *([{"role": 1, "content": 2}], [{"role": "user", "content": "\udfff"}]),
]
NO_JSON = (
    *(b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\xc3("}'),
    *(b"[" * 3900, b'{"a":' * 700, b'{"prompt":' + b"[" * 1500 + b"]" * 1500 + b"}"),
    *(b'{"prompt": "a", "max_tokens": ' + b"9" * 3900 + b"}", b" " * (MOST + 1)),
)
HEAD = f"Host: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
POST = f"POST {COMPLETIONS} HTTP/1.1\r\n{HEAD}Content-Type: application/json\r\n"
CHUNKED = f"{POST}Transfer-Encoding: chunked\r\n\r\n"
# What is no HTTP, and the status of its answer
BROKEN: list[tuple[bytes, int]] = [
    (b"FOO\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 300, 400),
    (b"GET /h\xffealth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\n\r\n", 400),
    (f"GET /health HTTP/1.1\r\n{HEAD}X : {KEY}\r\n\r\n".encode(), 400),
    (f"GET /health HTTP/1.1\r\n{HEAD}X: a\0b\r\n\r\n".encode(), 400),
    (f"GET /health HTTP/1.1\r\n{HEAD}X: {'a' * 400_000}\r\n\r\n".encode(), 431),
    (f"{POST}Content-Length: abc\r\n\r\n{{}}".encode(), 400),
    (f"{POST}Content-Length: -5\r\n\r\n{{}}".encode(), 400),
    (f"{POST}Content-Length: {'9' * 30}\r\n\r\n{{}}".encode(), 400),
    (f"{POST}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}".encode(), 400),
    (f"{POST}Transfer-Encoding: gzip\r\n\r\n{{}}".encode(), 400),
    (f"{CHUNKED}zz\r\n{{}}".encode(), 400),
    # the answer, that this is too much, has begun before the chunk that is none
    (f"{CHUNKED}20000\r\n{' ' * 0x20000}\r\nzz\r\n".encode(), 413),
]


@pytest.fixture(scope="module")
def url(packed: Path) -> Iterator[str]:
    limits = (
        *("--max-body", f"{MOST}B", "--name", "tiny", "--quiet"),
        *("--context", CONTEXT, "--max-tokens", 16),
    )
    with serving(packed, *limits, SPARSELLM_API_KEY=KEY) as (_, address):
        yield address.removesuffix("/v1")


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        yield client


def check_answer(status: int, body: str, case: object) -> None:
    """It is no failure of the server; a refusal has OpenAI's shape; nothing of this machine is told."""
    assert 200 <= status < 500, (case, body)
    told = body.replace("\\/", "/")
    for secret in ("Traceback", str(Path.home()), "site-packages", ".py", "/tmp/"):
        assert secret not in told, (case, body)
    if status < 400 or not body:
        return
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}, case
    assert error["type"] == "invalid_request_error", case
    assert isinstance(error["message"], str), case
    assert 0 < len(error["message"]) < 400, case


def exchanged(url: str, sent: bytes) -> tuple[int, str]:
    """The status and the body of the answer to these bytes."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            connection.sendall(sent)
            while part := connection.recv(1 << 16):
                received += part
        except ConnectionError:
            pass  # closed before it had read all
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def greedy_text(client: httpx.Client) -> str:
    answer = client.post(COMPLETIONS, json={"prompt": PROMPT, "max_tokens": 12})
    assert answer.status_code == 200
    return str(answer.json()["choices"][0]["text"])


def test_bad_requests_are_refused_in_openais_shape(
    url: str, client: httpx.Client, greedy: Any
) -> None:
    chance = random.Random(11)
    assert greedy_text(client) == greedy(PROMPT, 12)
    statuses = set()
    for _ in range(70):
        path = chance.choice((COMPLETIONS, CHAT))
        body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 2}
        if path == CHAT:
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        for field in chance.sample(FIELDS, chance.choice((1, 1, 2))):
            body[field] = chance.choice(VALUES)
        sent = json.dumps(body)
        answer = client.post(path, content=sent)
        case = (path, sent[:300])
        check_answer(answer.status_code, answer.text, case)
        statuses.add(answer.status_code)
        if answer.status_code in (400, 404):
            # the field that is named is one that the request has
            field = answer.json()["error"]["param"]
            assert field in body, (case, answer.text)
    assert statuses >= {200, 400}
    for content in NO_JSON:
        answer = client.post(COMPLETIONS, content=content)
        check_answer(answer.status_code, answer.text, content[:50])
        assert answer.status_code == (413 if len(content) > MOST else 400)
    for _ in range(25):
        method = chance.choice(METHODS)
        path = chance.choice(PATHS)
        answer = client.request(method, path)
        check_answer(answer.status_code, answer.text, (method, path))
        allowed = answer.headers.get("Allow", "").split(", ")
        assert (answer.status_code == 405) == (allowed != [""]), (method, path)
        assert method not in allowed, (method, path)
    assert greedy_text(client) == greedy(PROMPT, 12)


@pytest.mark.parametrize(
    ("sent", "status"), BROKEN, ids=[repr(sent[-40:]) for sent, _ in BROKEN]
)
def test_what_is_no_http_is_refused_in_openais_shape(
    sent: bytes, status: int, url: str, client: httpx.Client, greedy: Any
) -> None:
    answered, body = exchanged(url, sent)
    assert answered == status
    check_answer(answered, body, sent[:80])
    assert KEY not in body
    assert greedy_text(client) == greedy(PROMPT, 12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 5),
        ("model", ["tiny"]),
        ("prompt", ""),
        ("prompt", "xq" * CONTEXT),
        ("max_tokens", 17),
        ("max_completion_tokens", 17),
        ("stop", ["a"] * 17),
        ("stream_options", {"include_usage": 1}),
        ("presence_penalty", 50),
        ("n", 2),
    ],
)
def test_a_refusal_names_the_field(
    field: str, value: object, client: httpx.Client
) -> None:
    answer = client.post(COMPLETIONS, json={"prompt": PROMPT, field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
