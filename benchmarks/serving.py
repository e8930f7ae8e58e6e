"""Throughput of the engines that serve a model: `sparsellm serve`, vLLM, and llama.cpp, with one client and several.

    pip install 'sparsellm[serve]'
    python benchmarks/serving.py packed=DIR vllm=vllm:DIR Q4_1=model.gguf --vllm PYTHON --llama-server PATH \\
        [--clients 1 4 16] [--prompt-words 32 512] [--cpu-seconds]

A form is a name and a checkpoint directory, which sparsellm serves, or vLLM if `vllm:` stands before it, or a GGUF
file, which llama-server does. `--vllm` names the interpreter of an environment with vLLM (and sparsepack-vllm, for
packed directories); `--xllamacpp` one with xllamacpp, in place of `--llama-server`. All servers run at once, and take
turns in every round: each client sends a prompt of its own, which no cache has seen, and waits for its whole answer.
Counted are the generated tokens that the answers name, and the time from the first request to the last answer, prompts
included; with --cpu-seconds the processor's time of the server and its processes, which other jobs change
least. Ratios are medians of the rounds' own ratios to the first form.
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


# llama.cpp's server in Python: a model, a port, threads, clients, tokens of all contexts. It ends with its parent.
XLLAMACPP = """
import os, sys, time, xllamacpp
parent = os.getppid()
path, port, threads, clients, context = sys.argv[1:]
asked = xllamacpp.CommonParams()
asked.model.path = path
asked.hostnames = ["127.0.0.1"]
asked.port = int(port)
asked.n_parallel = int(clients)
asked.n_ctx = int(context)
asked.cpuparams.n_threads = int(threads)
asked.cpuparams_batch.n_threads = int(threads)
server = xllamacpp.Server(asked)
while os.getppid() == parent:
    time.sleep(1)
"""


@dataclass(frozen=True)
class Form:
    """A model and the engine that serves it."""

    engine: str  # sparsellm, vllm or llama.cpp
    path: Path

    @classmethod
    def of(cls, text: str) -> Form:
        """The form of a word of the command line."""
        before, colon, path = text.partition(":")
        if colon and before == "vllm":
            return cls("vllm", Path(path))
        return cls("sparsellm" if Path(text).is_dir() else "llama.cpp", Path(text))


@dataclass
class Server:
    """A running server, and the seconds of each round by the number of clients and the words of a prompt."""

    url: str
    process: psutil.Process
    rates: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=LOADING) as answer:
            return json.loads(answer.read() or "null")

    def computed(self) -> float:
        """Seconds of the processor, of the server and the processes that it started."""
        seconds = 0.0
        for process in (self.process, *self.process.children(recursive=True)):
            times = process.cpu_times()
            seconds += times.user + times.system
        return seconds


def chat(server: Server, message: str, new_tokens: int) -> Any:
    """OpenAI's object with the greedy answer to a message, in the model's chat template."""
    return server.ask(
        "/v1/chat/completions",
        {
            "model": server.ask("/v1/models")["data"][0]["id"],
            "messages": [{"role": "user", "content": message}],
            "max_tokens": new_tokens,
            "temperature": 0,
        },
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def command_of(form: Form, port: int, arguments: argparse.Namespace) -> list[str]:
    """The command that serves a form."""
    clients = str(max(arguments.clients))
    threads = str(arguments.threads)
    path = str(form.path)
    address = ["--host", "127.0.0.1", "--port", str(port)]
    all_contexts = str(max(arguments.clients) * arguments.context)
    if form.engine == "sparsellm":
        command = [sys.executable, "-m", "sparsellm", "serve", path]
        command += ["--port", str(port), "--threads", threads, "--quiet"]
        command += ["--queue", clients, "--context", str(arguments.context)]
        return [*command, "--dtype", arguments.dtype]
    if form.engine == "vllm":
        command = [str(arguments.vllm), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", path, *address]
        command += ["--dtype", arguments.dtype]
        command += ["--max-model-len", str(arguments.context)]
        return [*command, "--max-num-seqs", clients, *arguments.vllm_options.split()]
    if arguments.xllamacpp is not None:
        command = [str(arguments.xllamacpp), "-c", XLLAMACPP, path]
        return [*command, str(port), threads, clients, all_contexts]
    command = [str(arguments.llama_server), "--model", path, *address]
    command += ["--threads", threads, "--threads-batch", threads]
    return [*command, "--parallel", clients, "--ctx-size", all_contexts, "--no-webui"]


@contextlib.contextmanager
def serving(form: Form, arguments: argparse.Namespace) -> Iterator[Server]:
    """Starts the server of a form and waits until it answers."""
    port = free_port()
    command = command_of(form, port, arguments)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with (arguments.out / f"{form.path.name}-{port}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        end = time.monotonic() + LOADING
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
    server: Server,
    clients: int,
    prompt_words: int,
    arguments: argparse.Namespace,
    words: random.Random,
) -> float:
    """Generated tokens a second of all clients together."""
    model = server.ask("/v1/models")["data"][0]["id"]

    def answer(prompt: str) -> int:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": arguments.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return int(server.ask("/v1/completions", body)["usage"]["completion_tokens"])

    prompts = [" ".join(words.choices(WORDS, k=prompt_words)) for _ in range(clients)]
    start = time.perf_counter()
    computed = server.computed()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(answer, prompts))
    seconds = time.perf_counter() - start
    if arguments.cpu_seconds:
        seconds = server.computed() - computed
    return tokens / seconds


def version_of(python: Path, *packages: str) -> str:
    """The first of some packages that an environment has, with its version."""
    program = (
        "import importlib.metadata as m, sys\n"
        "names = {d.metadata['Name'] for d in m.distributions()}\n"
        "print(next(f'{n} {m.version(n)}' for n in sys.argv[1:] if n in names))"
    )
    done = subprocess.run(
        [python, "-c", program, *packages], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def parser_of_forms(
    description: str | None, *, new_tokens: int, context: int, out: Path | None
) -> argparse.ArgumentParser:
    """A command line with forms, and what ``serving`` has to know of them, with these defaults; ``out`` of None must be
    given. There is one client, and no vLLM, unless options for them are added."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("forms", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--llama-server", type=Path, help="the program, for GGUF files")
    parser.add_argument(
        "--xllamacpp", type=Path, help="an interpreter with xllamacpp, in its place"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="of sparsellm and vLLM")
    parser.add_argument("--new-tokens", type=int, default=new_tokens)
    parser.add_argument(
        "--context",
        type=int,
        default=context,
        help="tokens of a prompt and its answer",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=out,
        required=out is None,
        help="folder for what is kept, such as the logs of the servers",
    )
    parser.set_defaults(clients=[1], vllm=None, vllm_options="")
    return parser


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = parser_of_forms(__doc__, new_tokens=64, context=512, out=Path("/tmp"))
    parser.add_argument("--vllm", type=Path, help="interpreter of vLLM's environment")
    parser.add_argument(
        "--vllm-options", default="", help="more words for `vllm serve`"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt-words", type=int, nargs="+", default=[32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="processor time: a shared machine"
    )
    return parser.parse_args()


def forms_of(arguments: argparse.Namespace) -> dict[str, Form]:
    """The forms by name, without those whose engine was not given."""
    forms = {}
    for text in arguments.forms:
        name, _, path = text.partition("=")
        form = Form.of(path)
        engines = {
            "sparsellm": sys.executable,
            "vllm": arguments.vllm,
            "llama.cpp": arguments.llama_server or arguments.xllamacpp,
        }
        if engines[form.engine] is not None:
            forms[name] = form
    return forms


def measure(
    servers: dict[str, Server], arguments: argparse.Namespace
) -> list[tuple[int, int]]:
    """Fills the rates of all servers; returns the settings, clients and words of a prompt."""
    settings = [
        (clients, prompt_words)
        for prompt_words in arguments.prompt_words
        for clients in arguments.clients
    ]
    words = random.Random(0)
    for turn in range(arguments.rounds + 1):
        for clients, prompt_words in settings:
            for server in servers.values():
                rate = one_round(server, clients, prompt_words, arguments, words)
                if turn:  # the first round pays for pages and the choice of kernels
                    server.rates.setdefault((clients, prompt_words), []).append(rate)
    return settings


def main() -> None:
    arguments = parsed()
    arguments.out.mkdir(parents=True, exist_ok=True)
    forms = forms_of(arguments)
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(form, arguments))
            for name, form in forms.items()
        }
        settings = measure(servers, arguments)
    time_of = "processor" if arguments.cpu_seconds else "wall-clock"
    versions = []
    if arguments.vllm is not None:
        versions.append(version_of(arguments.vllm, "vllm", "vllm-cpu"))
    if arguments.xllamacpp is not None:
        versions.append(version_of(arguments.xllamacpp, "xllamacpp"))
    print(
        f"{arguments.new_tokens} tokens after a prompt, {arguments.rounds} rounds in turns, {time_of} time, "
        f"{arguments.threads} thread(s); {cpu_name()}, {', '.join((*versions, f'code {code_version()}'))}.\n"
    )
    heads = [
        f"{clients} clients, {prompt_words} words: tokens/s | ratio"
        for clients, prompt_words in settings
    ]
    print(f"| form | model | engine | {' | '.join(heads)} |")
    print("|---|---|---|" + "---|---|" * len(settings))
    first = next(iter(servers.values()))
    for name, server in servers.items():
        cells = [name, forms[name].path.name, forms[name].engine]
        for setting, rates in server.rates.items():
            ratios = [
                rate / other
                for rate, other in zip(rates, first.rates[setting], strict=True)
            ]
            spread = f"({min(ratios):.2f} – {max(ratios):.2f})"
            cells += [
                f"{statistics.median(rates):.1f}",
                f"{statistics.median(ratios):.2f} {spread}",
            ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
