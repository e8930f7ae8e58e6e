"""Fine-tuning that keeps zeros, in full and by LoRA: perplexity and zeros of a pruned checkpoint, before and after.

    pip install 'sparsellm[bench,tune]'
    sparsellm prune demo --out pruned --sparsity 0.7
    python benchmarks/tuning.py pruned --text wikitext2:wikitext2-raw-test.txt [--steps 32] [--ways full lora]

The training text is the Wikipedia sample (`--train` for another source); perplexity is on other text. Both ways use
transformers' Trainer as in the guide, AdamW at a constant rate after a short warm-up, and the same windows in the same
order. The tuned model is loaded, trained, saved and measured like any checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from quality import OUT, Cells
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from wikipedia import write_wikipedia

import sparsellm
from sparsellm.calibration.windows import calibration_windows
from sparsellm.chain.open import load_tokenizer
from sparsellm.chain.structure import find_blocks, iterate_linears, weight_of
from sparsellm.tuning.full import KeepZeros
from sparsellm.tuning.recover import RATES


def tuned(arguments: argparse.Namespace, way: str, windows: Tensor, out: Path) -> dict[str, Any]:
    """Trains one way and saves the whole model, the adapter merged."""
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.pruned, dtype=torch.float32)
    trained = sum(parameter.numel() for parameter in model.parameters())
    if way == "lora":
        from sparsellm.tuning.lora import add_adapter

        model = add_adapter(model)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    settings = TrainingArguments(
        str(out.with_suffix(".trainer")),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.rate or RATES[way],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, arguments.steps // 10),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=arguments.seed,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in windows]
    start = time.perf_counter()
    Trainer(model, settings, train_dataset=data, callbacks=[KeepZeros()] if way == "full" else []).train()
    seconds = time.perf_counter() - start
    merged: PreTrainedModel = model.merge_and_unload() if way == "lora" else model
    shutil.rmtree(out, ignore_errors=True)
    merged.save_pretrained(out)
    load_tokenizer(arguments.pruned).save_pretrained(out)
    return {"seconds": seconds, "trained": trained, **measured(arguments, out)}


def measured(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Perplexity, and zeros of the linears in the blocks."""
    score = sparsellm.evaluate(
        str(directory), arguments.text, seq_len=arguments.window, max_tokens=arguments.windows * arguments.window
    )
    linears = sparsellm.inspect(directory)
    return {
        "perplexity": score.value,
        "tokens": score.tokens,
        "zeros": sum(linear.zeros for linear in linears),
        "weights": sum(linear.weights for linear in linears),
    }


def same_zeros(first: Path, second: Path) -> bool:
    """Whether every weight that is zero in a linear of the first checkpoint's blocks is zero in the second's."""
    model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (first, second))
    name, blocks = find_blocks(model)
    before = {linear_name: weight_of(linear) for linear_name, linear in iterate_linears(blocks, name)}
    after = {linear_name: weight_of(other.get_submodule(linear_name)) for linear_name in before}
    return all(bool((after[linear][weight == 0] == 0).all()) for linear, weight in before.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruned", type=Path, help="a pruned checkpoint")
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--train", help="a text source; by default a sample of Wikipedia")
    parser.add_argument("--ways", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="windows a step")
    parser.add_argument("--train-window", type=int, default=512)
    parser.add_argument("--rate", type=float, help=f"learning rate; by default {RATES}")
    parser.add_argument("--window", type=int, default=1024, help="of the perplexity")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "tuning", help="for the tuned checkpoints and finished rows")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    tokenizer = load_tokenizer(arguments.pruned)
    source = arguments.train or str(write_wikipedia(OUT / "wikipedia.txt"))
    windows = calibration_windows(
        source, tokenizer, arguments.steps * arguments.batch, arguments.train_window, arguments.seed
    )
    text = Path(arguments.text).name
    shared = f"{arguments.pruned.name}/{text}/{arguments.windows}x{arguments.window}"
    training = f"{Path(source).name}/{arguments.steps}x{arguments.batch}x{arguments.train_window}/{arguments.rate}"
    cells = Cells(arguments.out / "tuning.json")
    rows = {"pruned": cells.get(f"{shared}/pruned", partial(measured, arguments, arguments.pruned))}
    for way in arguments.ways:
        rows[way] = cells.get(
            f"{shared}/{training}/{way}", partial(tuned, arguments, way, windows, arguments.out / way)
        )
    print(
        f"{arguments.pruned.name}: {text}, {arguments.windows} windows of {arguments.window}, "
        f"{rows['pruned']['tokens']} tokens scored; trained on {arguments.steps} steps of {arguments.batch} × "
        f"{arguments.train_window} tokens of {Path(source).name}, seed {arguments.seed}; {cpu_name()}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}.\n"
    )
    print(
        "| checkpoint | weights trained | seconds | perplexity | zeros of the linears | all that were zero still are |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        trained = f"{row['trained']:,} | {row['seconds']:.0f}" if "trained" in row else " | "
        same = "" if name == "pruned" else "yes" if same_zeros(arguments.pruned, arguments.out / name) else "NO"
        print(f"| {name} | {trained} | {row['perplexity']:.2f} | {row['zeros']:,} of {row['weights']:,} | {same} |")


if __name__ == "__main__":
    main()
