"""The memory of a server that has answered thousands of requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serving.process import KEY, serving

CLIENTS = 12
REQUESTS = 500  # between two looks at the memory
WARMING = 2  # looks, before threads, caches and the allocator have what they keep
LOOKS = WARMING + 4
MOST_GROWTH = 4 << 20  # bytes after the last look of warming
MANNERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.2, "top_p": 0.9, "seed": 1},
    {"temperature": 1.0, "frequency_penalty": 1.0},
    {"temperature": 0, "stream": True},
    {"temperature": 0, "stop": ["e"]},
    {"temperature": 9},  # is refused
]


@pytest.mark.slow
def test_two_thousand_requests_leave_no_memory_behind(packed: Path) -> None:
    """Prompts of many lengths, answers of all kinds, refusals, and clients that leave in the middle."""
    headers = {"Authorization": f"Bearer {KEY}"}

    def ask(number: int) -> None:
        body = {"prompt": "while " * (1 + number % 40), "max_tokens": 1 + number % 30}
        body |= MANNERS[number % len(MANNERS)]
        leaves = number % 7 == 0
        if leaves:
            body["max_tokens"] = 2000
        with suppress(httpx.TimeoutException):
            httpx.post(
                f"{url}/completions",
                json=body,
                headers=headers,
                timeout=0.05 if leaves else 60,
            )

    limits = ("--queue", CLIENTS, "--quiet", "--max-tokens", 2000)
    with serving(packed, *limits, SPARSELLM_API_KEY=KEY) as (process, url):
        inside = psutil.Process(process.pid)
        held = []
        with ThreadPoolExecutor(CLIENTS) as clients:
            for look in range(LOOKS):
                first = look * REQUESTS
                list(clients.map(ask, range(first, first + REQUESTS)))
                held.append(inside.memory_info().rss)
        state = httpx.get(url.removesuffix("v1") + "health").json()
    assert state["requests"] > REQUESTS * LOOKS / 2
    assert state["cancelled"] > 0
    assert held[-1] - held[WARMING - 1] < MOST_GROWTH, held
