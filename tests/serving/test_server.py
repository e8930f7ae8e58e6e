"""The server as its users meet it: a real process, OpenAI's own client, and a tiny packed model."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import psutil
import pytest
from openai import OpenAI

from sparsellm.serving.server import ServerSettings, open_door
from sparsellm.serving.worker import Job, UnavailableError, Worker
from sparsepack.decode import PIECE
from sparsepack.errors import SettingError
from sparsepack.generation import Answer, Generation, Sampling, continuation
from tests.models import save_tiny, tiny_gpt2, tiny_tokenizer
from tests.serving.conftest import CONTEXT
from tests.serving.process import KEY, serving

MOST = 4000
PROMPT = "The while statement"
ASKED: Any = [{"role": "user", "content": PROMPT}]
TEMPLATED = f"user: {PROMPT}\nassistant:"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
OPEN = "accepts requests from other machines, which needs a key; set SPARSELLM_API_KEY"
LONG = 8000  # tokens: seconds in which something can happen
AT_ONCE = 16  # answers


@pytest.fixture(scope="module")
def url(packed: Path) -> Iterator[str]:
    limits = (
        "--max-tokens",
        LONG,
        "--queue",
        1,
        "--max-body",
        f"{MOST}B",
        "--name",
        "tiny",
        "--quiet",
    )
    with serving(packed, *limits, SPARSELLM_API_KEY=KEY) as (_, address):
        yield address


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def prompt_ids(tokenizer: Any) -> Any:
    return tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def health(url: str) -> Any:
    return httpx.get(url.removesuffix("v1") + "health").json()


def test_chat_is_the_greedy_text_of_transformers(client: OpenAI, greedy: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, max_completion_tokens=24, tool_choice="auto"
    )
    (choice,) = answer.choices
    assert choice.message.content == greedy(TEMPLATED, 24)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tiny_tokenizer()(TEMPLATED)["input_ids"])
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (
        24,
        24 + answer.usage.prompt_tokens,
    )
    assert (
        [model.id for model in client.models.list()]
        == [client.models.retrieve("tiny").id]
        == ["tiny"]
    )
    with pytest.raises(
        openai.NotFoundError, match="model is 'other/one'; this server has 'tiny'"
    ):
        client.models.retrieve("other/one")


def test_a_stream_has_the_text_in_pieces_and_usage(client: OpenAI, greedy: Any) -> None:
    how: Any = {
        "max_tokens": 24,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chunks: Any = list(
        client.chat.completions.create(model="tiny", messages=ASKED, **how)
    )
    *pieces, end, usage = chunks
    assert [piece.choices[0].delta.role for piece in pieces] == ["assistant"] + [
        None
    ] * (len(pieces) - 1)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == greedy(
        TEMPLATED, 24
    )
    assert len(pieces) > 5
    assert {piece.choices[0].finish_reason for piece in pieces} == {None}
    assert end.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_take_text_and_a_list_of_one(client: OpenAI, greedy: Any) -> None:
    for prompt in (PROMPT, [PROMPT]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=16)
        assert answer.choices[0].text == greedy(PROMPT, 16)
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=16, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == greedy(PROMPT, 16)


def test_stop_strings_end_the_text_before_them(client: OpenAI, greedy: Any) -> None:
    text = greedy(PROMPT, 48)
    stops = [text[20:24], text[12:15], "not there", "nor there"]
    expected = text[: min(text.find(stop) for stop in stops[:2])]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=48, stop=stops
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (
        expected,
        "stop",
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens < 48
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=48, stop=stops[1], stream=True
    )
    assert (
        "".join(chunk.choices[0].text for chunk in stream)
        == text[: text.find(stops[1])]
    )


def test_a_seed_repeats_a_sample_and_none_does_not(client: OpenAI) -> None:
    def sample(**seed: int) -> str:
        how: Any = {"temperature": 1.5, "top_p": 0.95, **seed}
        return (
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, **how)
            .choices[0]
            .text
        )

    assert sample(seed=1) == sample(seed=1) != sample(seed=2)
    assert sample() != sample()


def wait_until(done: Any) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within half a minute")


def test_a_disconnect_ends_generation_and_frees_its_place(
    url: str, client: OpenAI, greedy: Any
) -> None:
    """Sixteen answers are made and one request waits; one more is refused, until a client goes away."""
    before = health(url)
    streams = []
    for _ in range(AT_ONCE):
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=1900, stream=True
        )
        next(iter(stream))
        streams.append(stream)
    with ThreadPoolExecutor(1) as others:
        waiting = others.submit(
            client.completions.create, model="tiny", prompt=PROMPT, max_tokens=8
        )
        wait_until(lambda: health(url)["waiting"] == 1)
        assert health(url)["running"] == AT_ONCE
        with pytest.raises(
            openai.InternalServerError, match="and 1 requests wait"
        ) as refused:
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8)
        assert (
            refused.value.status_code,
            refused.value.response.headers["Retry-After"],
        ) == (503, "1")
        streams[3].close()
        assert waiting.result().choices[0].text == greedy(PROMPT, 8)
    for stream in streams:
        stream.close()
    wait_until(lambda: health(url)["running"] == 0)
    after = health(url)
    assert after["cancelled"] == before["cancelled"] + AT_ONCE
    assert after["tokens"] - before["tokens"] < AT_ONCE * 1900
    with pytest.raises(openai.APITimeoutError):  # the client of a whole answer goes too
        client.with_options(timeout=0.3).completions.create(
            model="tiny", prompt=PROMPT, max_tokens=LONG
        )
    wait_until(lambda: health(url)["cancelled"] == after["cancelled"] + 1)
    assert health(url)["running"] == 0


def test_twelve_clients_get_what_each_gets_alone(model: Any, client: OpenAI) -> None:
    """Greedy and seeded answers, of different lengths and prompts, some longer than a piece."""

    def alone(index: int) -> str:
        ids = tiny_tokenizer()(prompts[index], return_tensors="pt")["input_ids"]
        return continuation(model, tiny_tokenizer(), ids, Sampling(**asked[index])).text

    def answered(index: int) -> str:
        how = dict(asked[index])
        tokens = how.pop("max_new_tokens")
        answer = client.completions.create(
            model="tiny", prompt=prompts[index], max_tokens=tokens, **how
        )
        return answer.choices[0].text

    prompts = [f"{PROMPT} {index} " * (1 + 20 * (index % 3)) for index in range(12)]
    asked: list[dict[str, Any]] = []
    for index in range(12):
        how: dict[str, Any] = {"max_new_tokens": 20 + 7 * index, "temperature": 0.0}
        if index % 2:
            how |= {"temperature": 1.2, "top_p": 0.9, "seed": index}
        asked.append(how)
    longest = tiny_tokenizer()(prompts[2])["input_ids"]
    assert len(longest) > PIECE
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(answered, range(12)))
    assert answers == [alone(index) for index in range(12)]


def test_answers_share_the_room_of_four_contexts(model: Any) -> None:
    """A job without room waits; a shorter one does not overtake it."""

    async def run() -> None:
        worker = Worker(
            model,
            tiny_tokenizer(),
            context=64,
            max_tokens=64,
            queue=20,
            log=lambda _: None,
        )
        jobs = [Job(prompt_ids, Sampling(), None) for _ in range(6)]
        for job in jobs:
            worker.submit(job)
        await jobs[0].event()
        state = worker.state()
        assert (state["running"], state["waiting"]) == (4, 2)
        for job in jobs:
            while isinstance(await job.event(), str):
                pass
        assert worker.state()["requests"] == 6
        worker.stop(0)

    asyncio.run(run())


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": ASKED, "n": 2}, 400, "n is 2, which this server does not support"),
    (
        {"messages": ASKED, "tools": [{"type": "function"}]},
        400,
        "which this server does not support",
    ),
    (
        {"messages": ASKED, "response_format": {"type": "json_object"}},
        400,
        "response_format is {'type': 'json_object'}, which this server does not support",
    ),
    ({"messages": ASKED, "logprobs": True}, 400, "logprobs is True, which"),
    ({"messages": ASKED, "logprobs": 0}, 400, "logprobs is 0, which"),
    ({"messages": ASKED, "tools": False}, 400, "tools is False, which"),
    ({"messages": ASKED, "tool_choice": "required"}, 400, "tool_choice is 'required'"),
    ({"messages": ASKED, "top_k": -2}, 400, "top_k is -2"),
    ({"messages": ASKED, "min_p": 2}, 400, "min_p is 2"),
    ({"messages": ASKED, "repetition_penalty": 0}, 400, "repetition_penalty is 0"),
    ({"messages": ASKED, "presence_penalty": 3}, 400, "presence_penalty is 3"),
    (
        {"messages": [{**ASKED[0], "tool_calls": [{"id": "1"}]}]},
        400,
        "tool_calls is",
    ),
    (
        {"messages": [{"role": "tool", "content": "1"}]},
        400,
        "messages.0.role",
    ),
    ({"messages": ASKED, "temperature": 3}, 400, "temperature is 3"),
    ({"messages": ASKED, "max_tokens": LONG + 1}, 400, f"at most {LONG} tokens"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages.0.content",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]},
        400,
        "messages.0.content is [{'type': 'image'",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages.0.content"),
    ({"messages": [{**ASKED[0], "name": 5}]}, 400, "messages.0.name is 5"),
    (
        {"messages": ASKED, "model": "gpt-4"},
        404,
        "model is 'gpt-4'; this server has 'tiny'",
    ),
    ({"messages": [{"role": "user", "content": "x" * MOST}]}, 413, f"at most {MOST}"),
]


@pytest.mark.parametrize(
    ("body", "status", "said"), REFUSED, ids=[said for _, _, said in REFUSED]
)
def test_a_bad_body_is_one_line_that_names_it(
    url: str, body: Any, status: int, said: str
) -> None:
    answer = httpx.post(
        f"{url}/chat/completions", content=json.dumps(body), headers=HEADERS
    )
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert said in message
    assert "\n" not in message


SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"),
    *("frequency_penalty", "presence_penalty", "max_tokens", "ignore_eos", "stream"),
)
STRANGE: list[Any] = [
    *(None, True, 0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 10**400),
    *("", "1", "\ud800", "x" * 600, [], ["a", ""], ["a"] * 9, {}, [None], [[1]]),
    *(float("nan"), float("inf"), -2, 0.999999, 1e-9, "nan"),
]


@pytest.mark.parametrize("many", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_generated_parameters_are_refused_in_a_line_or_taken(
    many: int, url: str
) -> None:
    chance = random.Random(7)
    for number in range(many):
        body: Any = {"messages": ASKED, "max_tokens": 2}
        for name in chance.sample(SAMPLING, chance.choice((1, 2, 3))):
            body[name] = chance.choice(STRANGE)
        if body["max_tokens"] is None or body["max_tokens"] is True:
            body["max_tokens"] = 2
        sent = json.dumps(body)
        answer = httpx.post(f"{url}/chat/completions", content=sent, headers=HEADERS)
        shown = (number, sent[:300], answer.text[:300])
        assert answer.status_code in (200, 400), shown
        if answer.status_code == 400:
            message = answer.json()["error"]["message"]
            assert any(name in message for name in body), shown
            assert "\n" not in message, shown
            assert len(message) < 400, shown
        elif body.get("stream"):
            assert answer.text.endswith("data: [DONE]\n\n"), shown
            assert '"error"' not in answer.text, shown
        else:
            assert answer.json()["usage"]["completion_tokens"] <= body["max_tokens"]
    assert health(url)["status"] == "ok"


def test_an_end_of_text_can_be_ignored(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = type(model.generation_config)(
        eos_token_id=list(range(model.config.vocab_size))
    )
    monkeypatch.setattr(model, "generation_config", every)
    for ignored, expected in ((False, (1, "stop")), (True, (8, "length"))):
        sampling = Sampling(max_new_tokens=8, ignore_eos=ignored)
        result = continuation(
            model, tiny_tokenizer(), prompt_ids(tiny_tokenizer()), sampling
        )
        assert (result.new_tokens, result.finish) == expected


def test_neutral_parameters_and_parts_of_text_are_taken(
    client: OpenAI, greedy: Any
) -> None:
    parts: Any = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": part} for part in (PROMPT[:5], PROMPT[5:])
            ],
        }
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=parts, max_tokens=8, n=1, logprobs=False, frequency_penalty=0, presence_penalty=0.0,
        tool_choice="none", service_tier="auto", parallel_tool_calls=True, metadata={}, top_logprobs=0,
        user="me", response_format={"type": "text"}, stop=None,
        extra_body={"mirostat": 2, "\u00fcnknown": {"a": 1}, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    )  # fmt: skip
    assert answer.choices[0].message.content == greedy(TEMPLATED, 8)


def test_what_user_interfaces_send_changes_the_answer(
    model: Any, client: OpenAI
) -> None:
    """Each parameter alone makes the answer that the library makes with it, which is not the one without it."""

    def answered(**asked: Any) -> str:
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=24, extra_body=asked
        )
        return answer.choices[0].text

    def alone(**asked: Any) -> str:
        sampling = Sampling(max_new_tokens=24, **asked)
        ids = prompt_ids(tiny_tokenizer())
        return continuation(model, tiny_tokenizer(), ids, sampling).text

    drawn = {"temperature": 1.5, "seed": 3, "top_k": 0}
    for how, first in (
        (drawn | {"top_k": 2}, drawn),
        (drawn | {"min_p": 0.9}, drawn),
        ({"temperature": 0.0, "repetition_penalty": 1.8}, {"temperature": 0.0}),
        ({"temperature": 0.0, "frequency_penalty": 2.0}, {"temperature": 0.0}),
        ({"temperature": 0.0, "presence_penalty": 2.0}, {"temperature": 0.0}),
    ):
        assert answered(**how) == alone(**how) != alone(**first)


def test_what_is_not_json_or_has_no_end_is_refused(url: str) -> None:
    for content, status in (
        (b"{bad", 400),
        (b"[1]", 400),
        (b"\xff", 400),
        (b"[" * 3000, 400),
    ):
        answer = httpx.post(f"{url}/completions", content=content, headers=HEADERS)
        assert answer.status_code == status, content
        assert answer.json()["error"]["type"] == "invalid_request_error"
    pieces = (b" " * 1000 for _ in range(10))  # no Content-Length
    assert (
        httpx.post(f"{url}/completions", content=pieces, headers=HEADERS).status_code
        == 413
    )
    # more than is ever read
    assert (
        httpx.post(
            f"{url}/completions", content=b" " * (40 * MOST), headers=HEADERS
        ).status_code
        == 413
    )
    # what a page of the web may send without asking
    plain = {
        **HEADERS,
        "Content-Type": "text/plain",
    }
    assert (
        httpx.post(
            f"{url}/completions", content=b'{"prompt":"x"}', headers=plain
        ).status_code
        == 400
    )
    assert (
        httpx.get(f"{url}/nothing", headers=HEADERS).json()["error"]["message"]
        == "Not Found"
    )


def test_a_wrong_key_is_refused(url: str) -> None:
    with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
        OpenAI(base_url=url, api_key=KEY + "x").models.list()
    with pytest.raises(openai.NotFoundError) as caught:
        OpenAI(base_url=url, api_key=KEY).models.retrieve("other")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        OpenAI(base_url=url, api_key="x").models.list()
    assert refused.value.code == "invalid_api_key"
    for header in (b"Bearer \xe9", b"Basic " + KEY.encode(), KEY.encode()):
        assert (
            httpx.get(f"{url}/models", headers={b"Authorization": header}).status_code
            == 401
        )
    assert httpx.get(f"{url}/models").status_code == 401
    assert (
        httpx.head(
            f"{url}/models", headers={"Authorization": f"bearer {KEY}"}
        ).status_code
        == 200
    )
    for model in OpenAI(base_url=url, api_key=KEY).models.list():
        assert (
            httpx.head(f"{url}/models/{model.id}", headers=HEADERS).status_code == 200
        )
    assert health(url)["status"] == "ok"


def test_the_program_of_templates_runs_before_the_first_conversation(
    packed: Path,
) -> None:
    """Its start takes a second, in which nothing is decoded."""
    with serving(packed, "--quiet") as (process, _):
        commands = [child.cmdline() for child in psutil.Process(process.pid).children()]
    assert [Path(command[2]).name for command in commands] == ["chat_renderer.py"]


def test_a_dense_model_without_template_serves_until_sigterm(tmp_path: Path) -> None:
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    with serving(save_tiny(model, tokenizer, tmp_path / "gpt2")) as (process, url):
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="gpt2", messages=ASKED)
        with pytest.raises(
            openai.BadRequestError, match="110 tokens and 19 are to follow"
        ):
            client.completions.create(model="gpt2", prompt="x" * 110, max_tokens=19)
        assert (
            httpx.get(
                f"{url}/models", headers={"Host": "a-page.example:80"}
            ).status_code
            == 400
        )
        stream = client.completions.create(
            model="gpt2", prompt=PROMPT, max_tokens=100, stream=True
        )
        pieces = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert process.wait(60) == 0
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=100, do_sample=False, pad_token_id=1)  # type: ignore[operator]
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected


def worker_of(model: Any, *, queue: int) -> Worker:
    """A worker that says nothing."""
    return Worker(
        model,
        tiny_tokenizer(),
        context=CONTEXT,
        max_tokens=CONTEXT,
        queue=queue,
        log=lambda _: None,
    )


def test_a_stop_cancels_what_runs_and_refuses_what_comes(model: Any) -> None:
    async def run() -> None:
        worker = worker_of(model, queue=2)
        first, second, late = (Job(prompt_ids, Sampling(), LONG) for _ in range(3))
        worker.submit(first)
        await first.event()
        worker.submit(second)
        await second.event()
        with pytest.raises(SettingError, match="max_tokens is 9000"):
            worker.submit(Job(prompt_ids, Sampling(), 9000))
        worker.stop(0)
        for job in (first, second):
            with pytest.raises(UnavailableError, match="stopping"):
                [await job.event() for _ in range(LONG)]
        with pytest.raises(UnavailableError, match="stopping"):
            worker.submit(late)
        assert await asyncio.to_thread(worker.ended, 30)
        assert worker.state()["cancelled"] == 2

    asyncio.run(run())


def test_a_stop_refuses_what_waits_and_lets_finish_what_runs(model: Any) -> None:
    """More jobs than run at once. One that does not stream gets its result alone."""

    async def run() -> None:
        worker = worker_of(model, queue=3)
        # four of them fill the room, which is that of four contexts
        room = CONTEXT - len(prompt_ids(tiny_tokenizer())[0])
        sampling = Sampling(ignore_eos=True)
        running = [Job(prompt_ids, sampling, room) for _ in range(4)]
        waiting = [Job(prompt_ids, sampling, room, streams=False) for _ in range(3)]
        for job in (*running, *waiting):
            worker.submit(job)
        for job in running:
            await job.event()
        assert worker.state()["waiting"] == 3
        worker.stop(60)
        assert worker.state()["status"] == "stopping"
        for job in waiting:
            with pytest.raises(UnavailableError, match="the server is stopping"):
                await job.event()
        worker.stop(0)
        assert await asyncio.to_thread(worker.ended, 30)
        assert (worker.state()["waiting"], worker.state()["running"]) == (0, 0)

    asyncio.run(run())


def test_a_job_that_does_not_stream_gets_its_result_alone(model: Any) -> None:
    async def run() -> Any:
        worker = worker_of(model, queue=1)
        job = Job(prompt_ids, Sampling(), 20, streams=False)
        worker.submit(job)
        result = await job.event()
        worker.stop(0)
        return result

    result = asyncio.run(run())
    assert (result.new_tokens, result.finish) == (20, "length")


def test_a_broken_request_leaves_the_server_alive(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        worker = worker_of(model, queue=2)
        job, next_job = (
            Job(Mock(side_effect=RuntimeError("no memory")), Sampling(), 4),
            Job(prompt_ids, Sampling(), 4),
        )
        worker.submit(job)
        worker.submit(next_job)
        with pytest.raises(Exception, match=r"the server failed \(RuntimeError\)"):
            await job.event()
        assert isinstance(await next_job.event(), str)
        worker.stop(0)

    asyncio.run(run())
    assert "no memory" in caplog.text


def test_an_answer_that_cannot_be_read_leaves_the_worker_alive(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        worker = worker_of(model, queue=2)
        with monkeypatch.context() as broken:
            broken.setattr(Answer, "result", Mock(side_effect=RuntimeError("no")))
            job = Job(prompt_ids, Sampling(), 4, streams=False)
            worker.submit(job)
            with pytest.raises(Exception, match=r"the server failed \(RuntimeError\)"):
                await job.event()
        next_job = Job(prompt_ids, Sampling(), 4, streams=False)
        worker.submit(next_job)
        result = await asyncio.wait_for(next_job.event(), 60)
        assert isinstance(result, Generation)
        assert result.new_tokens == 4
        worker.stop(0)

    asyncio.run(run())


def test_a_busy_port_is_one_line_before_the_model(run: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        stderr = run("serve", "nowhere", "--port", port, exits=2)[2]
    how = "stop what listens there, or give another --port"
    assert stderr == f"error: port {port} of '127.0.0.1' is in use; {how}\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "0.0.0.0"), f"--host 0.0.0.0 {OPEN}"),
        (("--port", "99999"), "--port is 99999"),
        (("--queue", "10001"), "--queue is 10001"),
        (("--context", "1"), "--context is 1"),
        (("--max-tokens", str(1 << 31)), f"--max-tokens is {1 << 31}"),
        (("--max-body", "2GiB"), f"--max-body is {2 << 30}"),
        (("--key-file", "{tmp}/empty"), "is empty or more than one word"),
        (("--key-file", "{tmp}/pipe"), "pipe is not an ordinary file"),
        (("--max-body", "much"), "size 'much' is unknown"),
        (("--port", "0", "{tmp}"), "config.json"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    options: Any, said: str, tmp_path: Path, refusal: Any
) -> None:
    (tmp_path / "empty").write_text("\n")
    os.mkfifo(tmp_path / "pipe")
    model = ["nowhere"] * ("{tmp}" not in options)
    assert said in refusal(
        "serve", *(option.format(tmp=tmp_path) for option in options), *model
    )


def test_a_key_of_a_file_is_that_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f" {KEY}\n")
    listening, key = open_door(ServerSettings(port=0, key_file=tmp_path / "key"))
    listening.close()
    assert key == KEY


def test_a_context_beyond_that_of_the_model_is_refused(
    packed: Path, refusal: Any
) -> None:
    said = refusal("serve", packed, "--port", 0, "--context", CONTEXT + 1)
    assert f"--context is {CONTEXT + 1}, and the model takes {CONTEXT}" in said


def test_a_missing_extra_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sparsellm.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert (
        run("serve", "nowhere", exits=2)[2]
        == "error: uvicorn is not installed: pip install starlette uvicorn\n"
    )
