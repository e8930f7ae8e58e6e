"""CPU time of each phase of a whole run, and its speed as a share of that of plain matrix products of the same sizes.

    python benchmarks/phases.py --model demo --samples 32 --seq-len 1024
    python benchmarks/phases.py --model demo --method sparsegpt --samples 8 --seq-len 512

``speed.py`` derives the operations of three phases from the shape of a Llama. This script runs any method on any model
in its own process, and counts every matrix product, attention and factorisation as torch executes it, by phase, sizes
and dtype. Attention is causal and counts by half; element-wise operations do not count. Plain products of the same
sizes and dtype are timed when the run first executes them and again at its end, and the faster time counts; these
timings are no part of the phases. ``reached`` is the time that the operations of a phase would take at that speed,
divided by the CPU time of the phase. ``in products`` is the share of that time which the products themselves took.
The time of counting, which slows the run down, is measured at the end and printed.
"""

from __future__ import annotations

import argparse
import functools
import pkgutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import cpu_name
from quality import OUT
from speed import Plain, Product
from torch.utils._python_dispatch import TorchDispatchMode
from wikipedia import write_wikipedia

import sparsellm
from sparsellm.chain.chain import Chain
from sparsellm.progress import PhaseClock
from sparsellm.recipe import Recipe

PLAIN_SECONDS = 0.1  # at least, for one timing of a plain product
REST = "everything else"
PHASES = {  # of the run's clock, whose other parts of ``prune`` are its rest; all others are REST
    "prune/statistics": "walk: forward passes",
    "forward": "walk: forward passes",
    "prune/solve": "walk: solver",
    "prune": "walk: rest of pruning",
    "gradients": "gradients: blocks",
    "sweep": "sweep: rest",
}
PARTS = {  # what these functions compute is no part of the phase that calls them
    "sparsellm.statistics.gram.GramAccumulator.update": "walk: Gram matrices",
    "sparsellm.statistics.gram.GramAccumulator.finish": "walk: Gram matrices",
    "sparsellm.statistics.gram.CrossAccumulator.update": "walk: Gram matrices",
    "sparsellm.sweep.gradients.through_head": "gradients: head and loss",
    "sparsellm.sweep.whole_model.through_head": "sweep: head and loss",
    "sparsellm.sweep.whole_model._Run.step": "sweep: forward and backward",
    "sparsellm.sweep.whole_model._Run.divergence": "sweep: forward of held-out steps",
    "sparsellm.sweep.training.Adam.step": "sweep: Adam",
}
aten = torch.ops.aten


class Work:
    """Operations of equal products, and the CPU seconds that they took."""

    def __init__(self) -> None:
        self.operations = self.seconds = 0.0


class Counted(TorchDispatchMode):
    """CPU seconds of every phase, without those of phases inside it, and the products in it.

    Args:
        plain: times a plain product of each size when it is first met.
    """

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.work: dict[str, dict[Product, Work]] = defaultdict(lambda: defaultdict(Work))
        self.calls = 0  # of operations of every kind
        self.timing = 0.0  # CPU seconds of plain products
        self._plain, self._known = plain, set[Product]()
        self._phases, self._since = [REST], 0.0  # from the start of the process

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.lap()
        self._phases.append(name)
        try:
            yield
        finally:
            self.lap()
            self._phases.pop()

    def lap(self) -> None:
        """Credits the current phase with the time that has passed."""
        now = time.process_time()
        self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        count = PRODUCTS.get(func.overloadpacket)
        if count is None:
            return func(*args, **(kwargs or {}))
        operations, product = count(*args)
        began = time.process_time()
        result = func(*args, **(kwargs or {}))
        work = self.work[self._phases[-1]][product]
        work.seconds += time.process_time() - began
        work.operations += operations
        if product not in self._known:
            self._known.add(product)
            self._time(product)
        return result

    def _time(self, product: Product) -> None:
        self.lap()
        with torch.random.fork_rng(devices=[]):  # the numbers that the run draws stay the same
            self._plain.speed(product)
        now = time.process_time()
        self.timing += now - self._since
        self._since = now


def _matrices(left: torch.Tensor, right: torch.Tensor, *_: Any) -> tuple[float, Product]:
    product = Product(left.shape[-2], left.shape[-1], right.shape[-1], left.dtype)
    return 2.0 * left.numel() * product.columns, product


def _sum(_: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *more: Any) -> tuple[float, Product]:
    return _matrices(left, right)


def _attention(products: int) -> Callable[..., tuple[float, Product]]:
    """Of queries and keys ``(batch, heads, seq, size)``; half of each product, since attention is causal."""

    def count(*args: Any) -> tuple[float, Product]:
        query, key = args[:2] if products == 2 else args[1:3]
        seq, size = query.shape[-2:]
        return products * query.numel() * key.shape[-2], Product(seq, size, key.shape[-2], query.dtype)

    return count


def _factorisation(cubes: float) -> Callable[..., tuple[float, Product]]:
    def count(matrix: torch.Tensor, *_: Any) -> tuple[float, Product]:
        size = matrix.shape[-1]
        return cubes * matrix.numel() * size, Product(size, size, size, matrix.dtype)

    return count


def _triangular(products: int) -> Callable[..., tuple[float, Product]]:
    """Solves with a triangular matrix, so many times; half a product each."""

    def count(first: torch.Tensor, second: torch.Tensor, *_: Any) -> tuple[float, Product]:
        matrix, right = (first, second) if products == 1 else (second, first)
        operations, product = _matrices(matrix, right)
        return products * operations / 2, product

    return count


PRODUCTS: dict[Any, Callable[..., tuple[float, Product]]] = {
    aten.mm: _matrices,
    aten.bmm: _matrices,
    aten.addmm: _sum,
    aten.addmm_: _sum,
    aten.baddbmm: _sum,
    aten.baddbmm_: _sum,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention(2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5),  # with the weights once more
    aten.linalg_cholesky_ex: _factorisation(1 / 3),
    aten.cholesky_inverse: _factorisation(2 / 3),
    aten.linalg_solve_triangular: _triangular(1),
    aten.cholesky_solve: _triangular(2),
}


@contextmanager
def counting(counted: Counted) -> Iterator[None]:
    """Counts what the library computes until the context ends."""
    of_clock, unpruned = PhaseClock.phase, Chain.unpruned

    @contextmanager
    def phase(clock: PhaseClock, name: str) -> Iterator[None]:
        with of_clock(clock, name), counted.phase(PHASES.get(name) or PHASES.get(name.partition("/")[0], REST)):
            yield

    @contextmanager
    def dense(chain: Chain) -> Iterator[None]:
        with unpruned(chain), counted.phase("sweep: dense model's pass"):
            yield

    def part(place: str, name: str) -> Any:
        function = pkgutil.resolve_name(place)

        @functools.wraps(function)
        def timed(*args: Any, **keywords: Any) -> Any:
            with counted.phase(name):
                return function(*args, **keywords)

        return mock.patch(place, timed)

    with ExitStack() as held:
        held.enter_context(mock.patch.object(PhaseClock, "phase", phase))
        held.enter_context(mock.patch.object(Chain, "unpruned", dense))
        for place, name in PARTS.items():
            held.enter_context(part(place, name))
        held.enter_context(counted)
        yield
    counted.lap()


def seconds_of_a_call() -> float:
    """CPU seconds that counting adds to one operation."""
    value, least = torch.zeros(1), []
    for held in (ExitStack(), Counted(Plain(time.process_time))):
        taken: list[float] = []
        with held:
            for _ in range(5):
                began = time.process_time()
                for _ in range(2000):
                    value.add_(1)
                taken.append(time.process_time() - began)
        least.append(min(taken) / 2000)
    return least[1] - least[0]


def number(value: float) -> str:
    """At least three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def row(name: str, taken: float, total: float, work: Mapping[Product, Work], plain: Plain) -> str:
    operations = sum(each.operations for each in work.values())
    narrow = sum(each.operations for product, each in work.items() if product.dtype is torch.bfloat16)
    start = f"| {name} | {taken:.1f} | {taken / total:.1%}"
    if not operations:
        return f"{start} | – | – | – | – | – | – |"
    ideal = sum(each.operations / plain.speed(product) for product, each in work.items())
    own = sum(each.seconds for each in work.values())
    return (
        f"{start} | {number(narrow / 1e9)} | {number((operations - narrow) / 1e9)} | {operations / taken / 1e9:.1f} "
        f"| {operations / ideal / 1e9:.1f} | {ideal / taken:.0%} | {own / taken:.0%} |"
    )


def table(counted: Counted, plain: Plain) -> Iterator[str]:
    """The rows of all phases, the longest first, and that of the whole."""
    total = sum(counted.seconds.values())
    for name in sorted(counted.seconds, key=lambda name: -counted.seconds[name]):
        yield row(name, counted.seconds[name], total, counted.work[name], plain)
    whole: dict[Product, Work] = defaultdict(Work)
    for part in counted.work.values():
        for product, each in part.items():
            whole[product].operations += each.operations
            whole[product].seconds += each.seconds
    yield row("**all**", total, total, whole, plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default="sparsellm")
    parser.add_argument("--effort", type=int, help="of sparsellm; by default its own")
    parser.add_argument("--calibration", help="a text source; by default a sample of Wikipedia")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--products", default="auto", help="dtype of the products of passes, as in a recipe")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = Recipe(
        sparsity=arguments.sparsity, method=arguments.method, samples=arguments.samples, seq_len=arguments.seq_len,
        calibration=arguments.calibration or str(write_wikipedia(OUT / "wikipedia.txt")), products=arguments.products,
        options={} if arguments.effort is None else {"effort": arguments.effort},
    )  # fmt: skip
    plain = Plain(time.process_time, PLAIN_SECONDS)
    counted = Counted(plain)
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="phases-", dir=OUT) as folder, counting(counted):
        sparsellm.prune(arguments.model, recipe, out=Path(folder) / "model")
    plain.again()
    print(
        f"{arguments.model}, {arguments.method}, sparsity {arguments.sparsity:g}, {arguments.samples} × "
        f"{arguments.seq_len} calibration tokens; {cpu_name()}, 1 thread, torch {torch.__version__}; CPU seconds from "
        f"Python's start to the finished checkpoint. Counting {counted.calls} operations took about "
        f"{counted.calls * seconds_of_a_call():.1f} s of them.\n"
    )
    print("| phase | CPU s | of the whole | GFLOP in bf16 | in fp32 | GFLOP/s | plain products, GFLOP/s | reached "
          "| in products |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(table(counted, plain)))


if __name__ == "__main__":
    main()
