"""Throughput of `sparsellm serve` next to llama.cpp's `llama-server`, with one client and with several.

    pip install 'sparsellm[serve]'
    python benchmarks/serving.py packed=DIR Q4_1=model.gguf --llama-server PATH [--clients 1 4] [--cpu-seconds]

A form is a name and a checkpoint directory, which sparsellm serves, or a GGUF file, which llama-server does. All
servers run at once, and take turns in every round: each client sends a prompt of its own, which no cache has seen, and
waits for its whole answer. Counted are the generated tokens that the answers name, and the time from the first request
to the last answer, prompts included; with --cpu-seconds the processor's time of the server, which other jobs on the
machine change least. Ratios are medians of the rounds' own ratios to the first form.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from measure import code_version, cpu_name

from sparsellm.errors import shown

WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "life",
    "child",
    "world",
    "school",
    "state",
    "group",
)
LOADING = 600.0  # seconds until a server must answer


@dataclass
class Server:
    """A running server, and the seconds of each round by the number of clients."""

    url: str
    process: psutil.Process
    rates: dict[int, list[float]] = field(default_factory=dict)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=LOADING) as answer:
            return json.load(answer)

    def computed(self) -> float:
        """Seconds of the processor."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def serving(path: Path, arguments: argparse.Namespace) -> Iterator[Server]:
    """Starts the server of a form and waits until it answers."""
    port, clients, context = free_port(), max(arguments.clients), arguments.context
    common = ["--port", str(port), "--threads", str(arguments.threads)]
    if path.is_dir():
        command = [
            sys.executable,
            "-m",
            "sparsellm",
            "serve",
            str(path),
            *common,
            "--queue",
            str(clients),
            "--quiet",
        ]
        command += ["--context", str(context), "--dtype", arguments.dtype]
    else:
        command = [
            str(arguments.llama_server),
            "--model",
            str(path),
            *common,
            "--host",
            "127.0.0.1",
        ]
        command += [
            "--threads-batch",
            str(arguments.threads),
            "--parallel",
            str(clients),
        ]
        command += ["--ctx-size", str(clients * context), "--no-webui"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    with (arguments.out / f"{path.name}-{port}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        server, end = (
            Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid)),
            time.monotonic() + LOADING,
        )
        while True:
            try:
                server.ask("/health")
                break
            except OSError:  # not listening yet, or status 503 while it loads
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(
                        f"{shown(command)} does not answer; its log is {log.name}"
                    ) from None
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait()


def one_round(
    server: Server, clients: int, arguments: argparse.Namespace, words: random.Random
) -> float:
    """Generated tokens a second of all clients together."""

    def answer(prompt: str) -> int:
        body = {
            "prompt": prompt,
            "max_tokens": arguments.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return int(server.ask("/v1/completions", body)["usage"]["completion_tokens"])

    prompts = [
        " ".join(words.choices(WORDS, k=arguments.prompt_words)) for _ in range(clients)
    ]
    start, computed = time.perf_counter(), server.computed()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(answer, prompts))
    seconds = (
        server.computed() - computed
        if arguments.cpu_seconds
        else time.perf_counter() - start
    )
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("forms", nargs="+", metavar="NAME=PATH")
    parser.add_argument(
        "--llama-server",
        type=Path,
        help="the program; without it, GGUF files are left out",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="of `sparsellm serve`")
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--context", type=int, default=512, help="tokens of a prompt and its answer"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="processor time: a shared machine"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("/tmp"),
        help="folder for the logs of the servers",
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = {
        name: Path(path)
        for name, _, path in (form.partition("=") for form in arguments.forms)
    }
    if arguments.llama_server is None:
        paths = {name: path for name, path in paths.items() if path.is_dir()}

    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(path, arguments))
            for name, path in paths.items()
        }
        words = random.Random(0)
        for turn in range(arguments.rounds + 1):
            for clients in arguments.clients:
                for server in servers.values():
                    rate = one_round(server, clients, arguments, words)
                    if turn:  # the first round pays for pages and the choice of kernels
                        server.rates.setdefault(clients, []).append(rate)
    time_of = "processor" if arguments.cpu_seconds else "wall-clock"
    print(
        f"{arguments.new_tokens} tokens after {arguments.prompt_words} words, {arguments.rounds} rounds in turns, "
        f"{time_of} time, {arguments.threads} thread(s); {cpu_name()}, code {code_version()}.\n"
    )
    print(
        "| form | server | "
        + " | ".join(
            f"{count} clients: tokens/s | ratio" for count in arguments.clients
        )
        + " |"
    )
    print("|---|---|" + "---|---|" * len(arguments.clients))
    first = next(iter(servers.values()))
    for name, server in servers.items():
        cells = [name, "sparsellm serve" if paths[name].is_dir() else "llama-server"]
        for clients, rates in server.rates.items():
            ratios = [
                rate / other
                for rate, other in zip(rates, first.rates[clients], strict=True)
            ]
            spread = f"({min(ratios):.2f} – {max(ratios):.2f})"
            cells += [
                f"{statistics.median(rates):.1f}",
                f"{statistics.median(ratios):.2f} {spread}",
            ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
