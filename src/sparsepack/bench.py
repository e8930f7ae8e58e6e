"""Speed and memory of packed and dense models. They run in turns, so that other load on the machine slows both."""

from __future__ import annotations

import inspect
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsellm.arguments import checked_arguments
from sparsellm.chain.likeness import config_difference, shape_difference
from sparsellm.chain.open import load_config
from sparsellm.chain.structure import cache_keyword
from sparsellm.errors import RecipeError
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsepack.checkpoint import open_checkpoint
from sparsepack.decode import Decoder, why_not
from sparsepack.loading import load
from sparsepack.module import PackedLinear, kernel_name, to_dense
from sparsepack.threads import threads_set

_SAME = 0.03  # relative difference in speed below which two models count as equally fast


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model in one setting: the median of the repeats, and their range.

    Attributes:
        model: its name in the comparison.
        phase: ``prefill`` (the whole prompt in one forward) or ``decode`` (a token at a time for each sequence).
        batch: sequences side by side.
        threads: of the CPU.
        median, slowest, fastest: tokens per second, over all sequences of the batch.
    """

    model: str
    phase: str
    batch: int
    threads: int
    median: float
    slowest: float
    fastest: float


@dataclass(frozen=True)
class Comparison:
    """A packed checkpoint against a dense one.

    Attributes:
        speeds: of ``dense`` and ``packed``, in every setting.
        dense_bytes, packed_bytes: all weights in memory.
        dense_linear_bytes, packed_linear_bytes: those of the linears in the blocks.
        dtype, dense_dtype: of the packed model's activations, and of the dense model.
        kernel: the kernel for small batches; see :func:`~sparsepack.module.kernel_name`.
        verdict: one sentence a setting.
        dense_disk_bytes, packed_disk_bytes: of the weight files; None for a model that was unpacked in memory.
    """

    speeds: list[Speed]
    dense_bytes: int
    packed_bytes: int
    dense_linear_bytes: int
    packed_linear_bytes: int
    dtype: str
    dense_dtype: str
    kernel: str
    verdict: list[str]
    dense_disk_bytes: int | None = None
    packed_disk_bytes: int | None = None

    def pairs(self) -> Iterator[tuple[Speed, Speed]]:
        """The dense and the packed model's speed in each setting."""
        return zip(
            (speed for speed in self.speeds if speed.model == "dense"),
            (speed for speed in self.speeds if speed.model == "packed"),
            strict=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain JSON values, as ``--json`` prints them."""
        return asdict(self)


@checked_arguments()
def compare(
    packed: str | os.PathLike[str],
    dense: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    activations: str | None = None,
    progress: ProgressCallback = ignore,
    **settings: Any,
) -> Comparison:
    """Speed and memory of a packed and a dense checkpoint; the models run in turns.

    Args:
        packed: a packed checkpoint.
        dense: a dense one; None for the packed one unpacked in memory, which is the same model with stored zeros.
        device, dtype, activations: as in :func:`sparsellm.load`; the last is of no concern to a dense model.
        progress: called with the progress of the measurement.
        settings: as in :func:`measure`.

    Raises:
        RecipeError: ``packed`` is not packed, ``dense`` is another model, or a setting is out of range.
        ModelError, StorageError: a checkpoint cannot be loaded.
    """
    if dense is not None:
        _check_same_model(Path(packed).expanduser(), Path(dense).expanduser())
    progress(Progress("load", 0, 2, "packed"))
    models = {"packed": load(packed, device=device, dtype=dtype, activations=activations)}
    if not any(isinstance(module, PackedLinear) for module in models["packed"].modules()):
        raise RecipeError(f"{packed} is not packed; pack it first: sparsellm pack {packed} --out DIR")
    progress(Progress("load", 1, 2, "dense"))
    if dense is None:
        models["dense"] = load(packed, device=device, dtype=dtype)
        to_dense(models["dense"])
    else:
        models["dense"] = load(dense, device=device, dtype=dtype)
    progress(Progress("load", 2, 2))
    speeds = measure(models, progress=progress, **settings)
    return Comparison(
        speeds,
        resident_bytes(models["dense"]),
        resident_bytes(models["packed"]),
        resident_bytes(models["dense"], linears_only=True),
        resident_bytes(models["packed"], linears_only=True),
        str(models["packed"].dtype).removeprefix("torch."),
        str(models["dense"].dtype).removeprefix("torch."),
        kernel_name(models["packed"].device.type),
        verdict(speeds, "dense", "packed"),
        None if dense is None else weight_file_bytes(Path(dense)),
        weight_file_bytes(Path(packed)),
    )


def _check_same_model(packed: Path, dense: Path) -> None:
    """Refuses a dense checkpoint of another model; what is no directory is left to :func:`load`.

    Raises:
        RecipeError: a config or the shape of a weight differs.
        ModelError, StorageError: a checkpoint cannot be read.
    """
    if not (packed.is_dir() and dense.is_dir()):
        return
    why = config_difference(load_config(packed), load_config(dense)) or shape_difference(
        open_checkpoint(packed),
        open_checkpoint(dense),
        whole=False,  # the same model may be saved under other names
    )
    if why is not None:
        raise RecipeError(f"dense is {dense}, which is another model than {packed}: in the latter, {why}")


@checked_arguments()
def measure(
    models: dict[str, PreTrainedModel],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    progress: ProgressCallback = ignore,
) -> list[Speed]:
    """Speed of several models, which take turns; the first round of each setting is not counted.

    Prompts are random tokens, since speed does not depend on the text.

    Args:
        models: by name, in memory, on the CPU or another device.
        batches: sequences side by side.
        threads: of the CPU; None for the current setting of torch.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens decoded after it.
        repeats: rounds that count.
        clock: returns seconds; ``time.process_time`` excludes other processes, but is only right for one thread.
        progress: called with the progress of the measurement.

    Raises:
        RecipeError: a number is not positive, or prompt and new tokens exceed the positions of a model.
    """
    threads = threads or (torch.get_num_threads(),)
    for name, model in models.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and limit < prompt_tokens + new_tokens:
            raise RecipeError(f"{prompt_tokens} + {new_tokens} tokens are more than the {limit} that {name} takes")
    speeds = []
    settings = [(count, batch) for count in threads for batch in batches]
    for index, (count, batch) in enumerate(settings):
        seconds: dict[tuple[str, str], list[float]] = {}
        with threads_set(count):
            for turn in range(repeats + 1):
                progress(
                    Progress(
                        "bench",
                        index + turn / (repeats + 1),
                        len(settings),
                        f"batch {batch}, {count} threads",
                    )
                )
                for name, model in models.items():
                    prefill, decode = one_run(model, batch, prompt_tokens, new_tokens, clock)
                    if turn:  # the first round includes page faults, the start of threads and the choice of kernels
                        seconds.setdefault((name, "prefill"), []).append(prefill)
                        seconds.setdefault((name, "decode"), []).append(decode)
        for phase, tokens in (("prefill", prompt_tokens), ("decode", new_tokens)):
            for name in models:
                rates = [batch * tokens / taken for taken in seconds[name, phase]]
                speeds.append(Speed(name, phase, batch, count, statistics.median(rates), min(rates), max(rates)))
    progress(Progress("bench", len(settings), len(settings)))
    return speeds


def verdict(speeds: Sequence[Speed], dense: str, packed: str) -> list[str]:
    """One sentence for each setting, which says whether packed is faster or slower than dense."""
    medians = {(speed.model, speed.phase, speed.batch, speed.threads): speed.median for speed in speeds}
    lines = []
    for speed in speeds:
        if speed.model != packed:
            continue
        ratio = speed.median / medians[dense, speed.phase, speed.batch, speed.threads]
        if abs(ratio - 1) < _SAME:
            what = "as fast as dense"
        elif ratio > 1:
            what = f"{ratio:.2f} times as fast as dense"
        else:
            what = f"SLOWER than dense on this machine, {ratio:.2f} times its speed"
        plural = "" if speed.threads == 1 else "s"
        lines.append(
            f"{speed.phase}, batch {speed.batch}, {speed.threads} thread{plural}: packed is {what} "
            f"({speed.median:.1f} tokens/s)"
        )
    return lines


def weight_file_bytes(directory: Path) -> int:
    """Bytes of the safetensors files of a checkpoint."""
    return sum(file.stat().st_size for file in directory.expanduser().glob("*.safetensors"))


def resident_bytes(model: nn.Module, linears_only: bool = False) -> int:
    """Bytes of a model's weights in memory, shared ones once; with ``linears_only``, of the linears in its blocks.

    Linears are :class:`PackedLinear` and ``nn.Linear``; an output head tied to the embedding, or any
    other linear outside a ``ModuleList``, is no linear of a block.
    """
    if not linears_only:
        return _storage_bytes([*model.parameters(), *model.buffers()])
    inside = {
        id(linear)
        for blocks in model.modules()
        if isinstance(blocks, nn.ModuleList)
        for linear in blocks.modules()
        if isinstance(linear, (nn.Linear, PackedLinear))
    }
    chosen = [module for module in model.modules() if id(module) in inside]
    return _storage_bytes([tensor for module in chosen for tensor in (*module.parameters(), *module.buffers())])


def _storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    parts = [part for tensor in tensors for part in _made_of(tensor)]
    sizes = {part.data_ptr(): part.numel() * part.element_size() for part in parts}
    return sum(sizes.values())


def _made_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors of a tensor: itself, or the parts of a subclass such as torchao's quantised weights."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in _made_of(getattr(tensor, name))]


@torch.no_grad()
def one_run(
    model: PreTrainedModel,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds to read a prompt of random tokens, and seconds to decode ``new_tokens`` after it.

    One sequence is decoded as :func:`~sparsepack.generation.generate` does, several by the model's own forward.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(model.device)
    keyword = cache_keyword(model)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    wait: Callable[[], Any] = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    if batch == 1 and why_not(model) is None:
        decoder = Decoder(model, prompt_tokens + new_tokens)
        start = clock()
        logits = decoder.read(ids)
        read = clock()
        for position in range(prompt_tokens, prompt_tokens + new_tokens):
            logits = decoder.step(int(logits.argmax()), position)
        return read - start, clock() - read
    wait()
    start = clock()
    output: Any = model(input_ids=ids, use_cache=True, **last_only)
    token = output.logits[:, -1:].argmax(-1)
    wait()
    read = clock()
    for _ in range(new_tokens):
        output = model(input_ids=token, use_cache=True, **{keyword: getattr(output, keyword)})
        token = output.logits[:, -1:].argmax(-1)
    wait()
    return read - start, clock() - read
