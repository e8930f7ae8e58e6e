"""What a Python user imports: :func:`prune`, :func:`evaluate`, :func:`inspect`."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import __version__, parallel
from sparsellm.calibration import calibration_windows, check_seq_len, evaluation_windows
from sparsellm.chain import Chain, open_chain
from sparsellm.chain.linears import iterate_linears
from sparsellm.chain.open import checkpoint_directory, load_tokenizer
from sparsellm.errors import DataError, NumericalError, RecipeError, SparseLLMError
from sparsellm.evaluation.perplexity import Perplexity
from sparsellm.evaluation.streamed import streamed_perplexity
from sparsellm.methods import METHODS, LinearResult
from sparsellm.methods.base import Method
from sparsellm.patterns import NM, Pattern, detect
from sparsellm.progress import PhaseClock, Progress, ProgressCallback, ignore
from sparsellm.recipe import Recipe
from sparsellm.registry import Entry
from sparsellm.storage.writer import CheckpointWriter, check_out, count_zeros
from sparsellm.streams import windows_in_batch
from sparsellm.walk import selected_linears, walk

DEFAULT_SEQ_LEN = 2048  # the window of the pruning papers


@dataclass
class PruneResult:
    """What a pruning run did.

    Attributes:
        path: the finished checkpoint, or None if the model was pruned in memory only.
        model: the pruned model if it is in memory, else None.
        recipe: all settings, as used.
        linears: what became of each pruned linear.
        seconds: wall-clock seconds of each phase; ``prune/statistics`` and ``prune/solve`` are parts of ``prune``.
        peak_rss: the most memory a process has held, in bytes.
        calibration_tokens: tokens the statistics come from.
        versions: of Python and the libraries that shape the result.
        warnings: what the user should know.
        command: the command line that ran.
        processes: that ran together.
    """

    path: Path | None
    model: PreTrainedModel | None
    recipe: Recipe
    linears: list[LinearResult]
    seconds: dict[str, float]
    peak_rss: int
    calibration_tokens: int
    versions: dict[str, str] = field(default_factory=lambda: versions())
    warnings: list[str] = field(default_factory=list)
    command: str = field(default_factory=lambda: shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    processes: int = 1

    @property
    def zeros(self) -> int:
        return sum(linear.zeros for linear in self.linears)

    @property
    def weights(self) -> int:
        """Weights in all pruned linears."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned linears."""
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; what ``--json`` prints and ``pruning.json`` holds."""
        return {
            "format": 1,
            "path": str(self.path) if self.path else None,
            "sparsity_asked": self.recipe.sparsity,
            "sparsity_reached": self.sparsity,
            "zeros": self.zeros,
            "weights": self.weights,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_rss_bytes": self.peak_rss,
            "calibration_tokens": self.calibration_tokens,
            "processes": self.processes,
            "seed": self.recipe.seed,
            "recipe": self.recipe.model_dump(),
            "versions": self.versions,
            "command": self.command,
            "warnings": self.warnings,
            "linears": [linear.to_dict() for linear in self.linears],
        }


def prune(
    model: str | Path | PreTrainedModel,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    calibration: str | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> PruneResult:
    """Prunes a model block by block.

    A model given by name is read from disk one block at a time and written to ``out`` one block at a time. A model
    given as an object is pruned in place, where it is, and also saved if ``out`` is given. A model given by name with
    no ``out`` is loaded whole and returned in ``result.model``.

    Where torch.distributed has been initialised with several processes, all of them must call this with the same
    arguments: they divide the calibration windows and the rows of each weight, the first writes and reports, and all
    end up with the same model.

    Args:
        model: a checkpoint directory, a hub id, a ``.gguf`` file, ``demo``, or a transformers model.
        recipe: what to do; ``Recipe()`` if None.
        out: the directory of the pruned checkpoint.
        calibration: a text source in place of the recipe's, or token ids ``(samples, seq)``.
        tokenizer: needed only for a model given as an object, unless ``calibration`` is token ids.
        overwrite: replace the checkpoint in ``out``.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: is told how far the run is.

    Raises:
        SparseLLMError: of the kind that names the trouble; all that can be known before the work starts is checked
            before the work starts.
    """
    recipe = recipe or Recipe()
    if isinstance(calibration, str):
        recipe = recipe.updated(calibration=calibration)
    method = METHODS[recipe.method]
    options = method.check(recipe.options)
    _check_processes(method, len(calibration) if isinstance(calibration, Tensor) else recipe.samples)
    if not parallel.is_main():
        progress = ignore
    device = resolve_device(recipe.device)
    clock = PhaseClock()
    warnings: list[str] = []
    out = Path(out) if out is not None else None
    if out is not None:
        check_out(out, overwrite=overwrite, need_bytes=0)
    with clock.phase("open"):
        progress(Progress("open", 0, 1, "opening the model"))
        directory = None
        if not isinstance(model, PreTrainedModel):
            directory = parallel.main_first(lambda: checkpoint_directory(str(model)))
        if directory is not None and out is not None and out.absolute() == directory.absolute():
            raise SparseLLMError(f"--out {out} is the model itself; name another directory")
        tokenizer = tokenizer or (load_tokenizer(directory) if directory is not None else None)
        chain, memory_model = _open(model, directory, recipe, device, in_memory=out is None, trust=trust_remote_code)
        patterns = plan(chain, recipe)
        if out is not None:
            check_out(out, overwrite=overwrite, need_bytes=_checkpoint_bytes(chain))
    with clock.phase("calibration"):
        progress(Progress("calibration", 0, 1, "reading the calibration text"))
        windows = parallel.from_main(partial(_windows, chain, recipe, calibration, tokenizer, directory, progress))
        recipe = recipe.updated(samples=len(windows), seq_len=windows.shape[1])
    with clock.phase("check"):
        progress(Progress("check", 0, 1, "checking the weights"))
        parallel.from_main(lambda: _check_finite(chain))
        already = _already_pruned(chain)
        if already is not None:
            warnings.append(already)
            progress(Progress("check", 1, 1, already))
    writer = None
    if out is not None and parallel.is_main():
        writer = CheckpointWriter(out, shards=len(chain) + 1, overwrite=overwrite, need_bytes=_checkpoint_bytes(chain))
        writer.write_shard(len(chain), chain.outer_tensors())
    torch.manual_seed(recipe.seed)
    results = walk(
        chain,
        windows[parallel.share(len(windows), windows_in_batch(recipe.batch_tokens, windows.shape[1]))],
        method.function,
        options,
        patterns,
        batch_tokens=recipe.batch_tokens,
        write_block=writer.write_shard if writer is not None else None,
        clock=clock,
        progress=progress,
        name=recipe.method,
    )
    result = PruneResult(
        None if out is None else out.absolute(),
        memory_model,
        recipe,
        results,
        clock.seconds,
        max(parallel.gather(peak_rss())),
        windows.numel(),
        warnings=warnings,
        processes=parallel.size(),
    )
    if writer is not None:
        _write_companions(writer, chain, directory, tokenizer)
        writer.write_text("recipe.yaml", recipe.to_yaml())
        writer.write_json("pruning.json", result.to_dict())
        writer.finish()
    parallel.barrier()  # the checkpoint has its name before any process goes on
    return result


def evaluate(
    model: str | Path | PreTrainedModel,
    text: str | Tensor,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> Perplexity:
    """Perplexity of a model, which is read block by block: it need not fit into memory.

    Args:
        model: as in :func:`prune`.
        text: a text source, or token ids ``(windows, seq)``.
        seq_len: tokens in a window; None for 2048, or what the model can take if less.
        max_tokens: stop after so many tokens of text.
        tokenizer: needed only for a model given as an object, unless ``text`` is token ids.
        device, dtype: as in :class:`Recipe`.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: is told how far the run is.

    Raises:
        SparseLLMError: the model or the text cannot be read, or the text is too short.
    """
    progress(Progress("open", 0, 1, "opening the model"))
    directory = None if isinstance(model, PreTrainedModel) else checkpoint_directory(str(model))
    recipe = Recipe(device=device, dtype=dtype)
    chain, _ = _open(model, directory, recipe, resolve_device(device), in_memory=False, trust=trust_remote_code)
    if isinstance(text, Tensor):
        windows = _checked_ids(text, chain)
    else:
        seq_len = seq_len or default_seq_len(chain)
        check_seq_len(chain.config, seq_len)
        tokenizer = tokenizer or (load_tokenizer(directory) if directory is not None else None)
        if tokenizer is None:
            raise DataError("a model given as an object needs tokenizer=..., or token ids in place of a text")
        windows = evaluation_windows(text, tokenizer, seq_len, max_tokens)
    return streamed_perplexity(chain, windows, progress=progress)


@dataclass(frozen=True)
class LinearZeros:
    """Zeros of one linear of a checkpoint, and the N:M pattern it satisfies (of 1:4, 2:4 and 4:8 the strictest)."""

    name: str
    block: int
    shape: tuple[int, int]
    zeros: int
    pattern: NM | None

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.shape[0] * self.shape[1])


def inspect(model: str | Path, *, trust_remote_code: bool = False) -> list[LinearZeros]:
    """Counts the zeros of every linear in the blocks of a checkpoint, read one block at a time.

    Raises:
        SparseLLMError: there is no such checkpoint, or it cannot be read.
    """
    directory = checkpoint_directory(str(model))
    chain = open_chain(directory, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=trust_remote_code)
    found = []
    for index in range(len(chain)):
        chain.load_block(index)
        for linear in chain.linears(index):
            weight = linear.weight()
            shape = (linear.out_features, linear.in_features)
            found.append(LinearZeros(linear.name, index, shape, count_zeros(weight), detect(weight)))
        chain.release_block(index)
    return found


def plan(chain: Chain, recipe: Recipe) -> dict[str, Pattern]:
    """The pattern of every linear that will be pruned, by name.

    Raises:
        RecipeError: the pattern does not fit a weight, or nothing is left to prune.
    """
    pattern = recipe.weight_pattern()
    patterns = {}
    for index in range(len(chain)):
        for linear in selected_linears(chain, index, recipe.exclude):
            pattern.validate((linear.out_features, linear.in_features), linear.weight_name)
            patterns[linear.name] = pattern
    if not patterns:
        raise RecipeError(f"exclude {recipe.exclude} leaves nothing to prune; name fewer linears")
    return patterns


def resolve_device(name: str) -> torch.device:
    """The device that a recipe names.

    Raises:
        RecipeError: no such device here.
    """
    name = parallel.own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"device {name!r} cannot be used here ({reason[:160]}); try 'cpu' or 'auto'") from None
    if device.type == "meta":
        raise RecipeError("device 'meta' holds no numbers; try 'cpu' or 'auto'")
    return device


def default_seq_len(chain: Chain) -> int:
    limit = getattr(chain.config.get_text_config(), "max_position_embeddings", None)
    return min(DEFAULT_SEQ_LEN, limit) if isinstance(limit, int) and limit > 0 else DEFAULT_SEQ_LEN


def peak_rss() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "safetensors", "numpy")
    return {
        "sparsellm": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _check_processes(method: Entry[Method], samples: int) -> None:
    size = parallel.size()
    if size == 1:
        return
    if not method.distributed:
        raise RecipeError(f"method {method.name} runs in one process, not in {size}; start it without torchrun")
    if samples < size:
        raise RecipeError(
            f"{samples} calibration windows cannot be divided among {size} processes; "
            f"ask for {size} samples or more, or start fewer processes"
        )


def _open(
    model: str | Path | PreTrainedModel,
    directory: Path | None,
    recipe: Recipe,
    device: torch.device,
    *,
    in_memory: bool,
    trust: bool,
) -> tuple[Chain, PreTrainedModel | None]:
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    if isinstance(model, PreTrainedModel):
        if recipe.device != "auto" or dtype is not None:
            raise RecipeError("a model given as an object is pruned where and as it is: leave device and dtype 'auto'")
        return open_chain(model, device=device), model
    assert directory is not None
    chain = open_chain(directory, device=device, dtype=dtype, trust_remote_code=trust)
    if not in_memory:
        return chain, None
    loaded = _load_whole(directory, chain.dtype, device, trust)
    return open_chain(loaded, device=device), loaded


def _windows(
    chain: Chain,
    recipe: Recipe,
    calibration: str | Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path | None,
    progress: ProgressCallback,
) -> Tensor:
    if isinstance(calibration, Tensor):
        return _checked_ids(calibration, chain)
    seq_len = recipe.seq_len or default_seq_len(chain)
    check_seq_len(chain.config, seq_len)
    if tokenizer is None:
        raise DataError("a model given as an object needs tokenizer=..., or token ids as calibration")
    with _model_that_writes(chain, recipe, directory) as dense:
        return calibration_windows(
            recipe.calibration,
            tokenizer,
            recipe.samples,
            seq_len,
            recipe.seed,
            model=dense,
            progress=lambda done, total: progress(Progress("calibration", done, total, "the model writes its text")),
        )


@contextmanager
def _model_that_writes(chain: Chain, recipe: Recipe, directory: Path | None) -> Iterator[PreTrainedModel | None]:
    """The whole dense model, only where the calibration text is the model's own."""
    if recipe.calibration != "self":
        yield None
    elif directory is None:
        yield chain.model
    else:
        yield _load_whole(directory, chain.dtype, chain.device, trust=False)


def _load_whole(directory: Path, dtype: torch.dtype, device: torch.device, trust: bool) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=trust, use_safetensors=True)
    assert isinstance(model, PreTrainedModel)
    torch.nn.Module.to(model, device)
    return model


def _checked_ids(ids: Tensor, chain: Chain) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise DataError(f"token ids must be integers of shape (windows, seq); got {ids.dtype} {tuple(ids.shape)}")
    check_seq_len(chain.config, ids.shape[1])
    vocabulary = chain.config.get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise DataError(f"token ids reach from {int(ids.min())} to {int(ids.max())}; the vocabulary has {vocabulary}")
    return ids


def _check_finite(chain: Chain) -> None:
    if chain.weights is not None:
        chain.weights.reader.check_finite()
        return
    for name, parameter in chain.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NumericalError(f"weight {name} has NaN or infinite values; load the model again")


def _already_pruned(chain: Chain) -> str | None:
    """A dense weight has hardly a zero; a fifth of them in block 0 means that somebody pruned it."""
    chain.load_block(0)
    zeros = weights = 0
    for _, module in iterate_linears(chain.blocks[0], chain.block_names[0]):
        weight = module.weight
        assert isinstance(weight, Tensor)
        zeros, weights = zeros + count_zeros(weight), weights + weight.numel()
    chain.release_block(0)
    if zeros < 0.2 * weights:
        return None
    return f"the model is already pruned: {zeros / weights:.1%} of the weights of block 1 are zero; pruning it further"


def _checkpoint_bytes(chain: Chain) -> int:
    if chain.weights is not None:
        return chain.weights.reader.bytes
    return sum(value.numel() * value.element_size() for value in chain.model.state_dict().values())


def _write_companions(
    writer: CheckpointWriter, chain: Chain, directory: Path | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if directory is not None:
        writer.copy_companions(directory)
        return
    chain.config.save_pretrained(writer.partial)
    generation = getattr(chain.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(writer.partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(writer.partial)
    writer.clean_config()


__all__ = [
    "LinearZeros",
    "PruneResult",
    "evaluate",
    "inspect",
    "plan",
    "prune",
]
