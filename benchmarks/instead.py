"""Compares the alternatives in one table: a model dense, quantised by other tools, and pruned and packed.

    pip install 'sparsellm[bench,instead]'
    python benchmarks/instead.py --text wikitext2:wikitext2-raw-test.txt --pruned 0.5=DIR 0.7=DIR [--threads 1]

All forms have the same weights: the dense model, its linears in torchao's int8 and int4 for weights, llama.cpp's Q8_0
and Q4_0 (made by llama.cpp from the model's GGUF file), and checkpoints pruned by `sparsellm prune`, packed with each
type of value. Speed is that of decoding one sequence; the forms run in turns, and medians are printed. Perplexity is on
the same windows of token ids for all; llama.cpp's is from its own logits. Activations are fp32 (llama.cpp chooses its
own), except for the speed of the row that is bf16 throughout. Perplexities are kept in a file, so that a stopped script
continues when it is run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from forms import quantised_gguf, torchao_model, torchao_numbers, with_numbers
from gguf import GGUFReader
from measure import cpu_name
from quality import OUT, Cells, identity
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm.files.demo_model import demo_gguf
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.model.open import load_tokenizer
from sparsellm.text.windows import evaluation_windows
from sparsepack.bench import one_run, resident_bytes
from sparsepack.module import kernel_name

CLOCKS: tuple[Callable[[], float], ...] = (time.perf_counter, time.process_time)
VALUES = ("keep", "bf16", "int8", "int4")


@torch.no_grad()
def perplexity(logits: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """``logits`` maps the ids of a window ``(tokens,)`` to ``(tokens, vocabulary)``."""
    losses = [
        float(functional.cross_entropy(logits(ids)[:-1].float(), ids[1:]))
        for ids in windows
    ]
    return math.exp(statistics.mean(losses))


@dataclass
class Form:
    """A model in one form: bytes of its linears and of everything, and what is measured when it is called."""

    linear_bytes: int
    all_bytes: int
    # (prompt tokens, new tokens, processor's or not) → seconds
    decode: Callable[[int, int, bool], float]
    score: Callable[[Tensor], float]  # windows → perplexity


def of_transformers(
    model: PreTrainedModel,
    score_as: PreTrainedModel | None = None,
    *,
    compiled: bool = True,
) -> Form:
    """A model of transformers; ``score_as`` has the same weights and computes the perplexity. With ``compiled``, our
    decoder runs it if it can, else transformers does."""
    return Form(
        resident_bytes(model, linears_only=True),
        resident_bytes(model),
        lambda prompt, new, cpu_seconds: one_run(
            model, 1, prompt, new, CLOCKS[cpu_seconds], compiled=compiled
        )[1],
        lambda windows: perplexity(
            lambda ids: (score_as or model)(ids[None], use_cache=False).logits[0],
            windows,
        ),
    )


def dense(directory: Path, dtype: torch.dtype, *, compiled: bool = True) -> Form:
    model = sparsellm.load(directory, dtype=dtype)
    # Where a CPU has no arithmetic in bf16, a long window takes minutes in it; these are the same weights in fp32.
    in_fp32 = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).float()
    return of_transformers(model, in_fp32, compiled=compiled)


def torchao(directory: Path, bits: int) -> Form:
    model = torchao_model(directory, bits)
    if bits == 8:
        return of_transformers(model)
    # Long windows take many minutes in torchao's int4 on a CPU without AVX-512; these are the weights it multiplies by.
    return of_transformers(
        model, with_numbers(directory, torchao_numbers(directory, bits))
    )


def packed(directory: Path, values: str, out: Path) -> Form:
    sparsellm.pack(
        directory,
        out=out,
        values=values,  # type: ignore[arg-type]
        head="keep",
        round_again=True,
        overwrite=True,
    )
    return of_transformers(sparsellm.load(out, dtype="float32"))


def llama_cpp(source: Path, kind: str, out: Path, threads: int, window: int) -> Form:
    from llama_cpp import Llama

    path = source if kind == "as shipped" else out / f"{source.stem}.{kind}.gguf"
    if path != source:
        quantised_gguf(source, kind, path, threads)
    model = Llama(
        str(path), n_ctx=window, n_batch=window, n_threads=threads, n_threads_batch=threads, logits_all=True,
        verbose=False,
    )  # fmt: skip

    def decode(prompt: int, new: int, cpu_seconds: bool) -> float:
        clock = CLOCKS[cpu_seconds]
        model.reset()
        model.eval(
            torch.randint(
                model.n_vocab(), (prompt,), generator=torch.Generator().manual_seed(0)
            ).tolist()
        )
        start = clock()
        for _ in range(new):
            model.eval([int(model.scores[model.n_tokens - 1].argmax())])
        return clock() - start

    def score(windows: Tensor) -> float:
        def logits(ids: Tensor) -> Tensor:
            model.reset()
            model.eval(ids.tolist())
            return torch.from_numpy(model.scores[: len(ids)])

        return perplexity(logits, windows)

    tensors = GGUFReader(path).tensors
    linears = [
        tensor
        for tensor in tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    ]
    return Form(
        sum(int(tensor.n_bytes) for tensor in linears),
        sum(int(tensor.n_bytes) for tensor in tensors),
        decode,
        score,
    )


def forms(arguments: argparse.Namespace) -> dict[str, Callable[[], Form]]:
    directory, out = checkpoint_directory(arguments.model), arguments.out
    openers: dict[str, Callable[[], Form]] = {
        "dense fp32": partial(dense, directory, torch.float32),
        "dense bf16": partial(dense, directory, torch.bfloat16),
        "dense bf16 by transformers": partial(
            dense, directory, torch.bfloat16, compiled=False
        ),
        "torchao int8, weights only": partial(torchao, directory, 8),
        "torchao int4, weights only, groups of 32": partial(torchao, directory, 4),
    }
    source = demo_gguf() if arguments.model == "demo" else Path(arguments.model)
    if source.suffix == ".gguf":
        for kind in ("as shipped", "Q8_0", "Q4_0"):
            name = (
                source.suffixes[-2].lstrip(".") + " " + kind
                if kind == "as shipped"
                else kind
            )
            openers[f"llama.cpp {name}"] = partial(
                llama_cpp, source, kind, out, arguments.threads, arguments.window
            )
    for pruned in arguments.pruned:
        sparsity, _, where = pruned.partition("=")
        for values in arguments.values:
            path = out / f"packed-{sparsity}-{values}"
            openers[f"packed {float(sparsity):.0%}, {values}"] = partial(
                packed, Path(where), values, path
            )
    return openers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--pruned",
        nargs="*",
        default=[],
        metavar="SPARSITY=DIR",
        help="checkpoints to pack",
    )
    parser.add_argument("--values", nargs="+", default=VALUES)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="processor time: one thread on a shared machine",
    )
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--skip", nargs="*", default=[], help="leave out rows whose name begins so"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT / "instead",
        help="for packed and quantised files",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e9,
        help="stop after a perplexity when this time is gone",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    tokenizer = load_tokenizer(checkpoint_directory(arguments.model))
    windows = evaluation_windows(
        arguments.text,
        tokenizer,
        arguments.window,
        arguments.windows * arguments.window,
    )
    cells = Cells(arguments.out / "perplexity.json")
    models = ",".join(
        identity(form.rpartition("=")[2])
        for form in (arguments.model, *arguments.pruned)
    )
    conditions = (
        f"{models}/{Path(arguments.text).name}/{len(windows)}x{arguments.window}"
    )
    rows, missing = {}, {}
    for name, opened in forms(arguments).items():
        if any(name.startswith(skipped) for skipped in arguments.skip):
            continue
        try:
            rows[name] = opened()
        except ImportError as error:
            missing[name] = str(error)
    scores = {}
    for name, form in rows.items():
        key = f"{conditions}/{name}"
        if key not in cells and time.perf_counter() - started > 60 * arguments.minutes:
            raise SystemExit(
                f"stopped before the perplexity of {name}; run it again to go on"
            )
        scores[name] = cells.get(key, partial(form.score, windows))

    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(arguments.repeats + 1):
        for name, form in rows.items():
            taken = form.decode(
                arguments.prompt_tokens, arguments.new_tokens, arguments.cpu_seconds
            )
            if turn:  # the first round pays for pages and the choice of kernels
                seconds[name].append(taken)

    print(
        f"Model {arguments.model}; {Path(arguments.text).name}, {len(windows)} windows of {arguments.window}; decoding "
        f"{arguments.new_tokens} tokens after {arguments.prompt_tokens}, median of {arguments.repeats} rounds in turns "
        f"(slowest – fastest), {'processor' if arguments.cpu_seconds else 'wall-clock'} time; {cpu_name()}, "
        f"{arguments.threads} thread(s), torch {torch.__version__}, kernel "
        f"{kernel_name()}.\n"
    )
    weights = rows["dense fp32"].linear_bytes / 4
    print(
        "| form | linears (MB) | bits per weight | all weights (MB) | tokens/s | perplexity |"
    )
    print("|---|---|---|---|---|---|")
    for name, form in rows.items():
        rates = [arguments.new_tokens / taken for taken in seconds[name]]
        print(
            f"| {name} | {form.linear_bytes / 1e6:.1f} | {8 * form.linear_bytes / weights:.2f} "
            f"| {form.all_bytes / 1e6:.1f} | {statistics.median(rates):.1f} ({min(rates):.1f} – {max(rates):.1f}) "
            f"| {scores[name]:.2f} |"
        )
    for name, reason in missing.items():
        print(f"\nno row {name}: {reason}")


if __name__ == "__main__":
    main()
