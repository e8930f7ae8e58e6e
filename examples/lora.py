"""Fine-tunes a pruned model by LoRA (arXiv 2106.09685, through peft) so that every zero stays.

A plain LoRA would fill all zeros when it is merged. Here the update has the zeros of the weight, `W + M∘(s·BA)` with
the mask `M` of the weights that are kept, in training as in merging, so merging changes nothing. A few steps on all
kept weights follow, in which the callback `KeepZeros` keeps the zeros.

python examples/lora.py pruned tuned my-text.txt        needs: pip install peft
"""

import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from sparsellm.tuning.full import KeepZeros

SEQ_LEN = 512


class MaskedLora(Linear):
    """peft's layer, with an update that is zero where the weight is zero."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        update = super().get_delta_weight(adapter)
        base: Any = self.get_base_layer()
        masked: Tensor = update * (base.weight != 0)
        return masked

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            update = self.get_delta_weight(adapter)
            result = result + nn.functional.linear(x, update)
        return result


def train(
    model: Any, rows: list[Any], out: str, *callbacks: Any, steps: int, rate: float
) -> None:
    arguments = TrainingArguments(
        out,
        learning_rate=rate,
        per_device_train_batch_size=1,
        max_steps=steps,
        report_to=[],
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()


def main(pruned: str, out: str, text: str, steps: str | int = 256) -> None:
    steps = int(steps)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
    length = min(SEQ_LEN, len(ids))
    starts = range(0, len(ids) - length + 1, length)
    windows = [ids[start : start + length] for start in starts]
    rows = [{"input_ids": window, "labels": window} for window in windows]
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    config._register_custom_module({nn.Linear: MaskedLora})
    adapted: Any = get_peft_model(model, config)
    train(adapted, rows, out, steps=steps, rate=1e-3)
    merged = adapted.merge_and_unload()  # an ordinary pruned model again
    merged.requires_grad_()
    train(merged, rows, out, KeepZeros(), steps=max(1, steps // 8), rate=1e-5)
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"written to {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
