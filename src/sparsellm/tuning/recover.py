"""Trains a pruned checkpoint on a text, so that it recovers, and writes the trained one with the same zeros."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sparsellm.errors import MemoryBudgetError, NumericalError, RecipeError
from sparsellm.files.directory import (
    WorkingDirectory,
    check_destination,
    checkpoints_among,
)
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.files.writer import written
from sparsellm.inputs import read_object
from sparsellm.machine import free_memory, resolve_device
from sparsellm.model import open_chain
from sparsellm.model.open import check_vocabulary, load_tokenizer
from sparsellm.progress import Progress, ProgressCallback, note
from sparsellm.records import PRUNING, read_pruning
from sparsellm.text.sources import SELF, check_sources, default_source
from sparsellm.text.windows import calibration_windows, check_seq_len
from sparsellm.tuning.full import KeepZeros, ZeroKeeper
from sparsepack.checkpoint import is_packed
from sparsepack.loading import load

RATES = {
    "full": 1e-4,
    "lora": 1e-3,
}  # a low-rank update starts at zero and has further to go
MOST_WINDOWS = (
    1024  # that are drawn from a text, or one batch; more steps take them again
)
BYTES = {
    "full": 20,
    "lora": 11,
}  # a weight in training: fp32, mask, gradient and moments or update, holes between
WIDTHS = 26  # activations of a block that gradients read, in widths of the model
TUNE = "tune"  # kind of run


class Training(BaseModel):
    """The settings of a training."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    way: Literal["full", "lora"] = "full"
    steps: int = Field(128, ge=1, le=1 << 31)
    rate: float | None = Field(None, gt=0, le=1)  # learning rate; None: that of the way
    batch: int = Field(1, ge=1, le=1 << 16)  # windows in a step
    seq_len: int = Field(512, ge=2, le=1 << 24)  # tokens in a window
    seed: int = Field(0, ge=0, lt=1 << 32)
    device: Literal["auto", "cpu", "cuda"] = "auto"  # one GPU at most


@dataclass(frozen=True)
class Tuned:
    """The result of :func:`tune`; losses are means of a token in nats, over the first and the last steps."""

    path: Path
    calibration: str
    first_loss: float
    last_loss: float
    seconds: float


def tune(
    model: str,
    out: Path,
    training: Training,
    calibration: str | None,
    progress: ProgressCallback,
    *,
    overwrite: bool = False,
) -> Tuned:
    """Trains the pruned checkpoint ``model`` on a text (``calibration`` as in a recipe) by AdamW at a constant rate
    after a short warm-up, and writes it to ``out``. Every zero stays. A training that is stopped leaves nothing.

    Raises:
        SparseLLMError: the model is packed, rounded or has no zeros, does not fit into memory, or the text or ``out``
            is refused; all before the work. A NumericalError says that the training diverged.
    """
    check_destination(out, overwrite=overwrite, sources=checkpoints_among(model))
    if calibration is not None and (SELF, "") in check_sources(
        calibration, "calibration"
    ):
        raise RecipeError(
            "tune does not train on text that the model writes (self); name a file or another source"
        )
    if training.way == "lora":
        import sparsellm.tuning.lora  # noqa: F401 - an error without peft
    source = checkpoint_directory(model)
    place = check_destination(out, overwrite=overwrite, sources=[source])
    if (source / PRUNING).is_file() and (
        values := read_pruning(source).values
    ) != "keep":
        raise RecipeError(
            f"{source} is rounded to {values}, and training would undo that; prune with values keep"
        )
    if is_packed(read_object(source / "config.json")):
        raise RecipeError(
            f"{source} is packed, and packed weights cannot be trained; unpack it first"
        )
    if calibration is None:
        calibration, warnings = default_source(demo=model == "demo")
        note(progress, warnings)
    progress(Progress(TUNE, 0, training.steps))
    chain = open_chain(source, device=torch.device("cpu"))
    assert chain.reader is not None
    weights = sum(math.prod(chain.reader.shape(name)) for name in chain.reader)
    device = resolve_device(training.device)
    room = free_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    check_seq_len(chain.config, training.seq_len)
    text, tokens = chain.config.get_text_config(), training.batch * training.seq_len
    activations = (
        4 * tokens * (3 * text.vocab_size + WIDTHS * len(chain) * text.hidden_size)
    )  # 3: logits, gradient
    if (
        needed := BYTES[training.way] * weights + activations
    ) > room or 4 * weights > free_memory():  # loaded in fp32
        ways = (
            "take --way lora, or a machine with more memory"
            if training.way == "full"
            else "take another machine"
        )
        ways = "lower --batch or --seq-len" if 2 * activations > needed else ways
        raise MemoryBudgetError(
            f"training needs {needed / 1e9:.1f} GB of memory, more than is free; {ways}"
        )
    tokenizer = load_tokenizer(source)
    samples = training.batch * min(
        training.steps, max(1, MOST_WINDOWS // training.batch)
    )  # whole batches
    windows = calibration_windows(
        calibration, tokenizer, samples, training.seq_len, training.seed
    )
    rows = [
        {"input_ids": row, "labels": row}
        for row in check_vocabulary(windows, chain.config, tokenizer)
    ]
    loaded = load(
        source, dtype="float32"
    )  # what the config names may be narrower than what is stored
    stored = {name: chain.reader.dtype(key) for name, key in chain.key_of.items()}
    ZeroKeeper(loaded)  # refuses a model without zeros, which LoRA would train too
    begun = time.perf_counter()
    work = WorkingDirectory(
        place, {"kind": TUNE}, overwrite=overwrite, need_bytes=chain.reader.bytes
    )
    with written(work, len(chain) + 1) as writer:
        trained, losses = _trained(loaded, training, rows, stored, progress)
        loads = {*chain.key_of.values()}  # all else, such as a vision tower, is copied
        others = {
            key: tensor
            for key, tensor in chain.outer_tensors().items()
            if key not in loads
        }
        result = open_chain(trained, device=torch.device("cpu"))
        result.write_as(chain)
        for index in range(len(result)):
            writer.write_shard(index, result.block_tensors(index))
        writer.write_shard(len(result), {**others, **result.outer_tensors()})
        writer.copy_companions(source)
    few = max(1, len(losses) // 8)
    first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
    return Tuned(work.out, calibration, first, last, time.perf_counter() - begun)


def _trained(
    model: PreTrainedModel,
    training: Training,
    rows: list[Any],
    stored: dict[str, torch.dtype],
    progress: ProgressCallback,
) -> tuple[PreTrainedModel, list[float]]:
    """The model after training, in the dtypes ``stored`` and on the CPU, and the loss of each step."""
    wrapped: Any = model
    callbacks = [KeepZeros()] if training.way == "full" else []
    if training.way == "lora":
        from sparsellm.tuning.lora import add_adapter

        wrapped = add_adapter(model)

    class Tell(TrainerCallback):
        """Passes steps on."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(
                Progress(
                    TUNE,
                    state.global_step,
                    training.steps,
                    f"step {state.global_step}/{training.steps}",
                )
            )

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=training.steps,
            per_device_train_batch_size=training.batch,
            learning_rate=training.rate or RATES[training.way],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=training.steps // 10,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,  # a batch is a few kilobytes, and some systems cannot pin memory
            use_cpu=training.device == "cpu" or not torch.cuda.is_available(),
            seed=training.seed,
        )
        settings._n_gpu = min(
            1, settings.n_gpu
        )  # with more, a step would have as many batches
        trainer = Trainer(
            wrapped, settings, train_dataset=rows, callbacks=[*callbacks, Tell()]
        )  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    merged = wrapped.merge_and_unload() if training.way == "lora" else wrapped
    merged.to("cpu")
    for name, tensor in (*merged.named_parameters(), *merged.named_buffers()):
        inside = (
            name.rpartition(".")[0] + "."
        )  # experts that the checkpoint has one by one, and the model in a stack
        parts = (dtype for part, dtype in stored.items() if part.startswith(inside))
        tensor.data = tensor.data.to(stored.get(name) or next(parts, tensor.dtype))
        if isinstance(tensor, nn.Parameter) and not torch.isfinite(tensor).all():
            raise NumericalError(
                f"{name} is not finite after training; take a lower --rate"
            )
    return merged, [
        float(record["loss"])
        for record in trainer.state.log_history
        if "loss" in record
    ]
