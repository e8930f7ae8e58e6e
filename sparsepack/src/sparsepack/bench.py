"""Speed and memory of packed and dense models. They run in turns, so that other load on the machine slows both."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsepack.arguments import MOST, check, check_counts
from sparsepack.checkpoint import is_packed
from sparsepack.decode import Cache, Decoder, decodes
from sparsepack.errors import FormatError, SettingError
from sparsepack.files import config_difference, context_limit, weight_files
from sparsepack.generation import MOST_THREADS, with_config
from sparsepack.loading import checkpoint_path, load
from sparsepack.module import PackedLinear, gather, kernel_name, threads_set, to_dense

ProgressCallback = Callable[[str, float, float, str], object]
"""Called with a phase, the steps done, the steps in all, and a text on the current step."""

_Decoder = Literal["compiled", "transformers"]
_SAME = 0.03  # relative difference in speed below which two models count as equally fast: what repeats differ by


@dataclass
class Speed:
    """Tokens per second of one model in one setting, over all ``batch`` sequences and all repeats.

    ``phase`` is ``prefill`` (the whole prompt in one forward) or ``decode`` (a token at a time for each sequence).
    ``decoder`` is the program that decoded: ``compiled`` is that of ``sparsepack.decode``, ``transformers`` its
    ``generate``."""

    model: str
    phase: str
    batch: int
    threads: int
    median: float
    slowest: float
    fastest: float
    decoder: _Decoder


@dataclass
class Ratio:
    """The packed model's speed divided by the dense one's in a setting: ``same_decoder`` by one decoder for both, or
    None if it does not run the dense model; ``dense_by_transformers`` with the dense model run by transformers."""

    phase: str
    batch: int
    threads: int
    same_decoder: float | None
    dense_by_transformers: float


@dataclass(frozen=True)
class Pair:
    """One setting: the packed model's speed, the dense one's by the same decoder (None if that does not run it), and
    the dense one's as transformers runs it."""

    packed: Speed
    same: Speed | None
    transformers: Speed

    @property
    def dense(self) -> Speed:
        """The dense model's speed by the same decoder where it is known, else as transformers runs it."""
        return self.transformers if self.same is None else self.same

    @property
    def against(self) -> list[tuple[str, Speed]]:
        """The dense model's speeds, each once, by what runs it."""
        speeds: list[tuple[str, Speed]] = []
        if self.same is not None:
            speeds.append(("the same decoder", self.same))
        if self.same is not self.transformers:
            speeds.append(("transformers", self.transformers))
        return speeds

    @property
    def ratio(self) -> Ratio:
        """The packed model's speed in relation to each of the dense one's."""
        same = None
        if self.same is not None:
            same = self.packed.median / self.same.median
        return Ratio(
            phase=self.packed.phase,
            batch=self.packed.batch,
            threads=self.packed.threads,
            same_decoder=same,
            dense_by_transformers=self.packed.median / self.transformers.median,
        )


@dataclass
class Comparison:
    """A packed checkpoint against a dense one.

    Attributes:
        speeds: those of ``dense`` and ``packed``, in every setting. Where the compiled decoder runs the dense model, it
            is measured by transformers' ``generate`` too.
        dense_bytes, packed_bytes: all weights in memory; ``linear``: those of the linears in the blocks; ``disk``: the
            weight files, None for a model that was unpacked in memory.
        dtype, dense_dtype: type of the packed model's activations, and of the dense model.
        kernel: the kernel for small batches; see ``sparsepack.module.kernel_name``.
        verdict: one sentence a setting.
        ratios: what the speeds are to each other, in every setting.
        packed_name, dense_name: the names of the directories; None for a model that was unpacked in memory."""

    speeds: Sequence[Speed]
    dense_bytes: int
    packed_bytes: int
    dense_linear_bytes: int
    packed_linear_bytes: int
    dtype: str
    dense_dtype: str
    kernel: str
    verdict: list[str]
    dense_disk_bytes: int | None
    packed_disk_bytes: int | None
    ratios: Sequence[Ratio] = field(default_factory=list)
    packed_name: str | None = None
    dense_name: str | None = None

    def pairs(self) -> list[Pair]:
        """The speeds of both models in each setting."""
        return pairs_of(self.speeds)


@dataclass(frozen=True)
class Rounds:
    """What is measured: numbers of sequences decoded together and of CPU threads (None for the current setting), tokens
    of each prompt, tokens decoded after it, and the rounds that count. A SettingError names what is out of range."""

    batches: Sequence[int] = (1,)
    threads: Sequence[int] | None = None
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5

    def __post_init__(self) -> None:
        check_counts("batches", self.batches, most=1 << 20)
        if self.threads is not None:
            check_counts("threads", self.threads, most=MOST_THREADS)
        check("prompt_tokens", self.prompt_tokens, int, least=1, most=MOST)
        check("new_tokens", self.new_tokens, int, least=1, most=MOST)
        check("repeats", self.repeats, int, least=1, most=1_000_000)


def compare(
    packed: str | os.PathLike[str],
    dense: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    activations: str | None = None,
    progress: ProgressCallback = lambda *_: None,
    **rounds: Any,
) -> Comparison:
    """Speed and memory of a packed and a dense checkpoint; the models run in turns.

    Args:
        packed: a packed checkpoint.
        dense: a dense one; None for the packed one unpacked in memory, which is the same model with stored zeros.
        device: as in ``sparsepack.loading.load``.
        dtype, activations: as there, for the packed model. The dense one runs in bfloat16, since in float32 it would be
            twice as large as the one that people run, and any packed model would look faster.
        progress: called with the progress of the measurement.
        rounds: the fields of ``Rounds``.

    Raises:
        SettingError: ``packed`` is not packed, ``dense`` is another model, or a setting is out of range.
        FormatError: a checkpoint cannot be loaded.
    """
    check("packed", packed, str, os.PathLike)
    if dense is not None:
        check("dense", dense, str, os.PathLike)
    check("progress", progress, Callable)
    chosen = Rounds(**rounds)
    if dense is not None and is_packed(config := _config(dense).to_dict()):
        raise SettingError(
            f"dense is {dense}, which is packed; leave it out, or unpack it: sparsellm unpack {dense}"
        )
    if dense is not None and config.get("quantization_config"):
        raise SettingError(
            f"dense is {dense}, which is quantised; give the checkpoint that it was made from"
        )
    if dense is not None and (
        difference := config_difference(
            _config(packed).to_dict(), _config(dense).to_dict()
        )
    ):
        raise SettingError(
            f"dense is {dense}, which is another model than {packed}: in the latter, {difference}"
        )
    progress("load", 0, 2, "packed")
    models = {
        "packed": load(packed, device=device, dtype=dtype, activations=activations)
    }
    if not any(
        isinstance(module, PackedLinear) for module in models["packed"].modules()
    ):
        raise SettingError(
            f"{packed} is not packed; pack it first: sparsellm pack {packed} --out DIR"
        )
    progress("load", 1, 2, "dense")
    models["dense"] = load(
        packed if dense is None else dense, device=device, dtype="bfloat16"
    )
    to_dense(models["dense"])
    gather(models["dense"], dense=decodes(models["dense"]))
    progress("load", 2, 2, "")
    speeds = measure(models, chosen, twice=("dense",), progress=progress)
    dense_disk_bytes = None
    dense_name = None
    if dense is not None:
        dense_disk_bytes = weight_file_bytes(Path(dense))
        dense_name = _name_of(dense)
    return Comparison(
        speeds=speeds,
        dense_bytes=resident_bytes(models["dense"]),
        packed_bytes=resident_bytes(models["packed"]),
        dense_linear_bytes=resident_bytes(models["dense"], linears_only=True),
        packed_linear_bytes=resident_bytes(models["packed"], linears_only=True),
        dtype=str(models["packed"].dtype).removeprefix("torch."),
        dense_dtype=str(models["dense"].dtype).removeprefix("torch."),
        kernel=kernel_name(models["packed"].device.type),
        verdict=verdict(speeds),
        dense_disk_bytes=dense_disk_bytes,
        packed_disk_bytes=weight_file_bytes(Path(packed)),
        ratios=[pair.ratio for pair in pairs_of(speeds)],
        packed_name=_name_of(packed),
        dense_name=dense_name,
    )


def _name_of(directory: str | os.PathLike[str]) -> str:
    return Path(directory).expanduser().resolve().name


def _config(directory: str | os.PathLike[str]) -> PretrainedConfig:
    path = checkpoint_path(directory)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=False
        )
    except Exception as error:  # an unknown model, or a value of the wrong type
        raise FormatError(
            f"transformers cannot read {path}: {' '.join(str(error).split())[:300]}"
        ) from error
    return config


def check_positions(config: PretrainedConfig, rounds: Rounds, name: str) -> None:
    """Refuses rounds of more tokens than a model has positions; ``name`` is that of the model in the error."""
    limit = context_limit(config)
    if limit is not None and limit < rounds.prompt_tokens + rounds.new_tokens:
        raise SettingError(
            f"{rounds.prompt_tokens} + {rounds.new_tokens} tokens are more than the {limit} that {name} takes"
        )


def measure(
    models: Mapping[str, PreTrainedModel],
    rounds: Rounds | None = None,
    *,
    twice: Container[str] = (),
    clock: Callable[[], float] = time.perf_counter,
    progress: ProgressCallback = lambda *_: None,
) -> list[Speed]:
    """Speed of several models by name, which take turns; the first round of each setting is not counted.

    One sequence is decoded by the compiled decoder where it knows the model, by transformers' ``generate`` too if the
    model's name is in ``twice``; several sequences by ``generate``. Prompts are random tokens, since speed does not
    depend on the text. ``clock`` returns seconds: ``time.process_time`` excludes other processes, but is only right for
    one thread.

    Raises:
        SettingError: prompt and new tokens exceed the positions of a model.
    """
    rounds = rounds or Rounds()
    tokens = {"prefill": rounds.prompt_tokens, "decode": rounds.new_tokens}
    for name, model in models.items():
        check_positions(model.config, rounds, name)
    speeds = []
    settings = [
        (count, batch)
        for count in rounds.threads or (torch.get_num_threads(),)
        for batch in rounds.batches
    ]
    for index, (count, batch) in enumerate(settings):
        seconds: dict[tuple[str, str, _Decoder], list[float]] = {}
        with threads_set(count):
            for turn in range(rounds.repeats + 1):
                progress(
                    "bench",
                    index + turn / (rounds.repeats + 1),
                    len(settings),
                    f"batch {batch}, {count} threads",
                )
                for name, model in models.items():
                    compiled = batch == 1 and decodes(model)
                    decoders: list[_Decoder] = ["compiled"] * compiled
                    decoders += ["transformers"] * (not compiled or name in twice)
                    for decoder in decoders:
                        run = one_run(
                            model,
                            batch,
                            prompt_tokens=rounds.prompt_tokens,
                            new_tokens=rounds.new_tokens,
                            clock=clock,
                            compiled=decoder == "compiled",
                        )
                        if turn:  # the first includes page faults, the start of threads and the choice of kernels
                            for phase, taken in zip(tokens, run, strict=True):
                                seconds.setdefault((phase, name, decoder), []).append(
                                    taken
                                )
        for (phase, name, decoder), runs in sorted(
            seconds.items(), key=lambda item: item[0][0], reverse=True
        ):
            rates = [batch * tokens[phase] / taken for taken in runs]
            speeds.append(
                Speed(
                    model=name,
                    phase=phase,
                    batch=batch,
                    threads=count,
                    median=statistics.median(rates),
                    slowest=min(rates),
                    fastest=max(rates),
                    decoder=decoder,
                )
            )
    progress("bench", len(settings), len(settings), "")
    return speeds


def pairs_of(speeds: Sequence[Speed]) -> list[Pair]:
    """The speeds of ``dense`` and ``packed`` in each setting."""
    settings: dict[tuple[str, int, int], list[Speed]] = {}
    for speed in speeds:
        settings.setdefault((speed.phase, speed.batch, speed.threads), []).append(speed)
    pairs = []
    for measured in settings.values():
        packed = next((speed for speed in measured if speed.model == "packed"), None)
        dense = {speed.decoder: speed for speed in measured if speed.model == "dense"}
        if packed is not None and "transformers" in dense:
            pairs.append(Pair(packed, dense.get(packed.decoder), dense["transformers"]))
    return pairs


def verdict(speeds: Sequence[Speed]) -> list[str]:
    """One sentence for each setting, which says whether packed is faster or slower than dense by the same decoder, and
    its ratio to the dense model as transformers runs it."""
    lines = []
    for pair in pairs_of(speeds):
        packed = pair.packed
        ratio = pair.ratio
        where = f"{packed.phase}, batch {packed.batch}, {packed.threads} thread{'s' * (packed.threads != 1)}"
        line = f"{where}: packed is {_outcome(packed.median / pair.dense.median)} ({packed.median:.1f} tokens/s)"
        if (
            pair.same is not None
            and pair.same is not pair.transformers
            and packed.phase == "decode"
        ):
            line += f" by the same decoder; {ratio.dense_by_transformers:.2f} × dense as transformers runs it"
        lines.append(line)
    return lines


def _outcome(ratio: float) -> str:
    if abs(ratio - 1) < _SAME:
        return "as fast as dense"
    if ratio > 1:
        return f"{ratio:.2f} times as fast as dense"
    return f"SLOWER than dense on this machine, {ratio:.2f} times its speed"


def weight_file_bytes(directory: Path) -> int:
    """Bytes of the safetensors files of a checkpoint."""
    return sum(file.stat().st_size for file in weight_files(directory.expanduser())[0])


def resident_bytes(model: nn.Module, linears_only: bool = False) -> int:
    """Bytes of a model's weights in memory, shared ones once; with ``linears_only``, of linears inside a ModuleList."""
    modules: Sequence[nn.Module] = [model]
    if linears_only:
        blocks = [
            module for module in model.modules() if isinstance(module, nn.ModuleList)
        ]
        linears = [
            m
            for block in blocks
            for m in block.modules()
            if isinstance(m, (nn.Linear, Conv1D, PackedLinear))
        ]
        modules = list(dict.fromkeys(linears))
    tensors = [
        tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    ]
    return sum(
        {
            part.data_ptr(): part.nbytes
            for tensor in tensors
            for part in _plain_parts(tensor)
        }.values()
    )


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of a tensor: itself, or the parts of a subclass such as torchao's quantised weights."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [
        part
        for name in tensor.__tensor_flatten__()[0]
        for part in _plain_parts(getattr(tensor, name))
    ]


@torch.no_grad()
def one_run(
    model: PreTrainedModel,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    compiled: bool = True,
) -> tuple[float, float]:
    """Seconds to read a prompt of random tokens, and seconds to decode ``new_tokens`` after it.

    With ``compiled``, one sequence is decoded as ``sparsepack.generation.generate`` does, if the compiled decoder
    knows the model; all else by transformers' ``generate``."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(
        vocabulary, (batch, prompt_tokens), generator=generator, device="cpu"
    ).to(model.device)
    if compiled and batch == 1 and decodes(model):
        positions = prompt_tokens + new_tokens
        decoder = Decoder(model, positions)
        cache = Cache(decoder, positions)
        start = clock()
        *_, logits = cache.read(ids)
        read = clock()
        for _ in range(new_tokens):
            logits = decoder.step([int(logits.argmax())], [cache])
        return read - start, clock() - read
    calls = itertools.count()
    times: list[float] = []

    # transformers copies each token to the CPU before the call, which waits for a GPU.
    def put(_: Tensor) -> None:
        if next(calls) in (1, new_tokens + 1):  # the first call has the prompt
            times.append(clock())

    greedy = GenerationConfig(
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        max_new_tokens=new_tokens + 1,
    )
    ends = SimpleNamespace(put=put, end=lambda: None)
    configured = with_config(model, greedy)
    start = clock()
    configured.generate(ids, attention_mask=torch.ones_like(ids), streamer=ends)  # type: ignore[operator]
    first, last = times
    return first - start, last - first
