"""Everything that is measured on a GPU, in one command.

    pip install 'sparsellm[bench,gpu]'
    python benchmarks/gpu.py [--parts gemv moments store prune decode] [--tokens 1 8] [--rounds 20] [--layers 22]

    gemv    the Triton kernel on packed weights against cuBLAS in bf16, torch's 2:4 and bitsandbytes' 4 bits
    moments Gram matrices of bf16 inputs with fp32 results, against those of fp32 inputs
    store   a step through parameters and moments that stay on the GPU, in pinned memory, and in a file
    prune   seconds and memory to prune one block
    decode  tokens per second of packed models and of the dense one

Products are captured in a CUDA graph of several, on weights that take turns, so that neither Python nor the cache is
measured. The forms run in turns, and every round's time is divided by that of cuBLAS in the same round; medians are
printed. Without a GPU the script ends with exit code 2. (``--device cpu`` with ``TRITON_INTERPRET=1`` shows that the
script runs; its times mean nothing.)
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from payoff import llama, prune_at_random
from torch import Tensor
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm import Recipe
from sparsellm.files.scratch import Room, Scratch, TensorStore
from sparsellm.method.gram import GramAccumulator
from sparsellm.patterns import NM
from sparsepack.bench import Rounds, measure, resident_bytes
from sparsepack.layout import pack

# 1.1B and Llama 7B
SHAPES = (
    "2048x2048",
    "5632x2048",
    "2048x5632",
    "4096x4096",
    "11008x4096",
    "4096x11008",
)
# width, inner width, heads of keys and values
BLOCKS = {
    "1.1B": (2048, 5632, 4),
    "7B": (4096, 11008, 32),
}
HELD = 256 << 20  # bytes of weights that take turns: more than any cache
BURST = 20  # products in one measurement
Product = Callable[[int], object]  # the weight whose turn it is


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed on a GPU.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--values", nargs="+", default=["int8", "int4", "bf16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument(
        "--methods", nargs="+", default=["wanda", "sparsegpt", "admm", "sparsellm"]
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=32,
        help="windows of 1024 tokens that a block is pruned on",
    )
    parser.add_argument(
        "--layers", type=int, default=22, help="of the model that decodes"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda"):
        if not torch.cuda.is_available():
            sys.stderr.write(
                "benchmarks/gpu.py: torch finds no CUDA GPU here; run it on a machine with one\n"
            )
            sys.exit(2)
        # streams, events and launches are there
        torch.cuda.set_device(torch.device(arguments.device).index or 0)
        arguments.device = "cuda"
    torch.manual_seed(0)
    name = (
        torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else "no GPU: times mean nothing"
    )
    sys.stdout.write(f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    for part in arguments.parts:
        PARTS[part](arguments)


def table(*columns: str) -> None:
    """The head of a table."""
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells: str) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def gemv(arguments: argparse.Namespace) -> None:
    """Products of a few tokens with one weight."""
    sys.stdout.write("\nOne linear: microseconds, and cuBLAS's time over a form's\n\n")
    table(
        "shape", "sparsity", "tokens", "form", "MB", "µs", "speed / cuBLAS bf16", "GB/s"
    )
    for shape, sparsity, tokens in itertools.product(
        arguments.shapes, arguments.sparsities, arguments.tokens
    ):
        out, columns = (int(side) for side in shape.split("x"))
        forms = products(out, columns, sparsity, tokens, arguments)
        times = in_turns([product for product, _ in forms.values()], arguments)
        for (name, (_, size)), taken in zip(forms.items(), times, strict=True):
            ratio = statistics.median(
                first / second for first, second in zip(times[0], taken, strict=True)
            )
            typical = statistics.median(taken)
            row(
                f"{out} × {columns}", f"{sparsity:.0%}", str(tokens), name, f"{size / 1e6:.1f}",
                f"{typical * 1e6:.1f}", f"{ratio:.2f}", f"{size / typical / 1e9:.0f}",
            )  # fmt: skip


def products(
    out: int, columns: int, sparsity: float, tokens: int, arguments: argparse.Namespace
) -> dict[str, tuple[Product, int]]:
    """name → product and bytes of the weight; cuBLAS is the first."""
    x = torch.randn(tokens, columns, device=arguments.device).bfloat16()
    weight = torch.randn(out, columns)
    weight[torch.rand(out, columns) < sparsity] = 0
    forms = {"cuBLAS bf16": multiplying(x, weight.bfloat16().to(arguments.device))}
    for values in arguments.values:
        forms[f"packed {values}"] = packed_product(x, weight, values)
    if (
        sparsity == 0.5
        and arguments.device == "cuda"
        and torch.cuda.get_device_capability() >= (8, 0)
    ):
        two_of_four = torch.randn(out, columns).abs().add(1e-3)
        two_of_four *= NM(2, 4).mask(two_of_four)
        dense, size = (
            two_of_four.bfloat16().to(arguments.device),
            out * columns * 9 // 8,
        )
        sparse = [
            torch.sparse.to_sparse_semi_structured(dense)
            for _ in range(copies(size, x))
        ]
        forms["torch 2:4 bf16"] = (
            (lambda turn: torch.nn.functional.linear(x, sparse[turn % len(sparse)])),
            size,
        )
    if (
        importlib.util.find_spec("bitsandbytes") is not None
        and arguments.device == "cuda"
    ):
        forms["bitsandbytes 4 bits"] = bitsandbytes_product(x, weight)
    return forms


def multiplying(x: Tensor, weight: Tensor) -> tuple[Product, int]:
    size = weight.nbytes
    weights = [weight, *(weight.clone() for _ in range(copies(size, x) - 1))]
    return (
        lambda turn: torch.nn.functional.linear(x, weights[turn % len(weights)])
    ), size


def packed_product(x: Tensor, weight: Tensor, values: str) -> tuple[Product, int]:
    from sparsepack import triton_kernels

    first = pack(weight, values, "bitmask")
    assert first is not None
    weights = [first.to(x.device)]
    for _ in range(copies(first.nbytes, x) - 1):
        weights.append(first.to("cpu").to(x.device))
    return (
        lambda turn: triton_kernels.multiply(weights[turn % len(weights)], x)
    ), first.nbytes


def bitsandbytes_product(x: Tensor, weight: Tensor) -> tuple[Product, int]:
    from bitsandbytes.nn import Linear4bit

    def one() -> Any:
        linear = Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16
        )
        linear.load_state_dict({"weight": weight.bfloat16()})
        return linear.to(x.device)

    size = int(weight.numel() * 4.5 / 8)
    linears = [one() for _ in range(copies(size, x))]
    return (lambda turn: linears[turn % len(linears)](x)), size


def copies(size: int, x: Tensor) -> int:
    return max(2, HELD // size) if x.device.type == "cuda" else 1


@torch.no_grad()
def in_turns(
    runs: Sequence[Product], arguments: argparse.Namespace
) -> list[list[float]]:
    """Seconds of one product of every form in every round."""
    bursts = [burst(run, arguments.device) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(arguments.rounds):
        for seconds, taken in zip(bursts, times, strict=True):
            taken.append(seconds())
    return times


def burst(run: Product, device: str) -> Callable[[], float]:
    """What returns the seconds of one product, measured over several in a graph."""
    if device != "cuda":

        def once() -> float:
            start = time.perf_counter()
            run(0)
            return time.perf_counter() - start

        return once
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for turn in range(3):  # compiles, and fills the library's workspaces
            run(turn)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(BURST):
            run(turn)
    begin, end = (
        torch.cuda.Event(enable_timing=True),
        torch.cuda.Event(enable_timing=True),
    )

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / BURST

    return replay


def moments(arguments: argparse.Namespace) -> None:
    """Gram matrices of 4096 tokens."""
    sys.stdout.write(
        "\nGram matrices of 4096 tokens: seconds, and the relative error of the sum\n\n"
    )
    table("inputs", "dtype", "ms", "TFLOP/s", "error")
    sizes = (2048, 4096, 11008) if arguments.device == "cuda" else (256,)
    for features, dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        x = torch.randn(4096, features, device=arguments.device).bfloat16()
        right = x[:, :64].double().T @ x.double() / len(x)
        gram = GramAccumulator(features, x.device)
        seconds = waited(lambda: gram.update(x.to(dtype)), arguments)  # noqa: B023 - called here
        error = float(
            (gram.finish().matrix[:64].double() - right).norm() / right.norm()
        )
        speed = 4096 * features**2 / seconds / 1e12  # half of the matrix
        row(
            str(features),
            str(dtype),
            f"{seconds * 1e3:.2f}",
            f"{speed:.1f}",
            f"{error:.1e}",
        )


def store(arguments: argparse.Namespace) -> None:
    """Reads and writes the parameters and moments of 8 blocks of 2^26 weights, as a step of the sweep does."""
    sys.stdout.write(
        "\nParameters and moments of 8 blocks of 67M weights, read and written once\n\n"
    )
    table("where", "seconds", "GB/s each way")
    size = 1 << (26 if arguments.device == "cuda" else 16)
    for where, on_device, memory in (
        ("GPU", 1 << 40, 0),
        ("pinned memory", 0, 1 << 40),
        ("file", 0, 0),
    ):
        with Scratch(Room(memory), on_device=Room(on_device)).store(
            arguments.device
        ) as kept:
            for _ in range(8):
                kept.append(torch.ones(3, size, device=arguments.device))

            def step(kept: TensorStore = kept) -> None:
                for index in range(8):
                    block = kept[index]
                    kept.expect(index + 1)
                    kept[index] = block.mul_(0.5)

            seconds = waited(step, arguments)
        row(where, f"{seconds:.3f}", f"{8 * 12 * size / seconds / 1e9:.1f}")


def waited(run: Callable[[], object], arguments: argparse.Namespace) -> float:
    """Seconds of one run, the median of a few, with all that it began."""
    times = []
    for _ in range(min(5, arguments.rounds) + 1):
        start = time.perf_counter()
        run()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def prune(arguments: argparse.Namespace) -> None:
    """Seconds and memory to prune one block of a real size."""
    sys.stdout.write(
        f"\nOne block, {arguments.samples} windows of 1024 tokens, 50 %, bf16\n\n"
    )
    table("model", "method", "seconds", "GB on the device")
    for name, method in itertools.product(arguments.blocks, arguments.methods):
        width, inner, heads = BLOCKS[name]
        model = llama(
            1, hidden_size=width, intermediate_size=inner, num_key_value_heads=heads
        )
        ids = torch.randint(
            32000, (arguments.samples, 1024), generator=torch.Generator().manual_seed(0)
        )
        effort = 0 if method == "sparsellm" else None
        recipe = Recipe(
            method=method, effort=effort, device=arguments.device, dtype="bfloat16"
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(Path(folder) / "dense")
            if arguments.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            sparsellm.prune(
                Path(folder) / "dense",
                recipe,
                calibration=ids,
                out=Path(folder) / "pruned",
            )
            seconds = time.perf_counter() - start
        used = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
        row(
            name,
            method,
            f"{seconds:.1f}",
            f"{used / 1e9:.2f}",
        )


def decode(arguments: argparse.Namespace) -> None:
    """Tokens per second of a model of 1.1B's shape."""
    sys.stdout.write(
        f"\nLlama of 1.1B's shape, {arguments.layers} layers, {arguments.new_tokens} tokens decoded\n\n"
    )
    table(
        "sparsity",
        "model",
        "MB",
        "prefill tokens/s",
        "decode tokens/s",
        "speed / dense bf16",
    )
    source = llama(arguments.layers)
    for sparsity in sorted(arguments.sparsities):
        prune_at_random(source, sparsity)
        with tempfile.TemporaryDirectory() as folder:
            dense = Path(folder) / "dense"
            source.save_pretrained(dense)
            models: dict[str, Any] = {
                "dense bf16": AutoModelForCausalLM.from_pretrained(
                    dense, dtype=torch.bfloat16
                ).to(arguments.device)
            }
            for values in (
                "keep" if values == "bf16" else values for values in arguments.values
            ):
                sparsellm.pack(
                    dense, out=Path(folder) / values, values=values, head="keep"
                )
                models[f"packed {values}"] = sparsellm.load(
                    Path(folder) / values, device=arguments.device
                )
            threads = [torch.get_num_threads()]
            rounds = Rounds(
                threads=threads,
                new_tokens=arguments.new_tokens,
                repeats=min(5, arguments.rounds),
            )
            speeds = measure(models, rounds)
        rates = {(speed.model, speed.phase): speed.median for speed in speeds}
        for name, model in models.items():
            row(
                f"{sparsity:.0%}", name, f"{resident_bytes(model) / 1e6:.0f}", f"{rates[name, 'prefill']:.0f}",
                f"{rates[name, 'decode']:.1f}", f"{rates[name, 'decode'] / rates['dense bf16', 'decode']:.2f}",
            )  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "gemv": gemv,
    "moments": moments,
    "store": store,
    "prune": prune,
    "decode": decode,
}

if __name__ == "__main__":
    main()
