"""Trains a small OPT (ReLU), Llama or Phi (parallel blocks) from scratch, as a reference model.

The text is what every Python installation has. Writes DIR with a checkpoint and its tokenizer for ``sparsellm prune
DIR``, ``train.txt`` for calibration, and ``heldout.txt``, other documents, for evaluation. The seed determines weights,
text and the order of batches. The number of steps within the given minutes depends on the machine and is printed.

    python benchmarks/train_opt.py --out out/opt                    # ten minutes
    python benchmarks/quality.py --model out/opt --text out/opt/heldout.txt --calibration out/opt/train.txt --window 256
    python benchmarks/train_opt.py --architecture llama --bf16 --layers 4 --vocabulary 2048 --rate 3e-3 --out out/llama

``--packages torch scipy`` adds the docstrings of those installed packages, which have far more text than Python itself.
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

OUT = Path(__file__).parent / "out"
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
HELD_OUT = 0.08  # fraction of the documents
SHORTEST = 200  # characters of a document


def docstrings(folder: Path) -> list[list[str]]:
    """The docstrings of every module under a folder, module by module."""
    pages = []
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        if not {"site-packages", "test", "tests"}.isdisjoint(inside):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (
            SyntaxError,
            UnicodeDecodeError,
        ):  # written for other tools, or broken on purpose
            continue
        named = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, named)
        ]
        pages.append([text for text in texts if text])
    return pages


def documents(seed: int, packages: Sequence[str] = ()) -> list[str]:
    """The language's help topics, and docstrings of the standard library and of packages, in random order.

    Modules of a package often copy a docstring. Only the first has it here, so that no copy is in the part held out.
    """
    pages = [str(topics[name]) for name in sorted(topics)]
    pages += [
        "\n\n".join(texts) for texts in docstrings(Path(sysconfig.get_path("stdlib")))
    ]
    seen: set[str] = set()
    for name in packages:
        for texts in docstrings(Path(str(files(name)))):
            pages.append(
                "\n\n".join(dict.fromkeys(text for text in texts if text not in seen))
            )
            seen.update(texts)
    pages = [text for text in dict.fromkeys(pages) if len(text) >= SHORTEST]
    random.Random(seed).shuffle(pages)
    return pages


def tokenizer_of(
    texts: list[str], vocabulary: int, positions: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, pad_token=EOS,
        model_max_length=positions,
    )  # fmt: skip


def ids_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    return torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, ids: torch.Tensor, positions: int, windows: int = 32
) -> float:
    """Mean loss of a token in nats, on the first windows."""
    model.eval()
    parts = ids[: min(windows, len(ids) // positions) * positions].view(-1, positions)
    scored = [model(part[None], use_cache=False).logits[0, :-1] for part in parts]
    losses = [
        float(functional.cross_entropy(scores, part[1:]))
        for scores, part in zip(scored, parts, strict=True)
    ]
    model.train()
    return sum(losses) / len(losses)


def train(
    model: PreTrainedModel, ids: torch.Tensor, arguments: argparse.Namespace
) -> None:
    """AdamW for `minutes`; the learning rate follows the clock: up over the first 5 %, then down by a cosine.

    The clock is that of the thread, so that other programs of a busy machine take no steps away.
    """
    generator = torch.Generator().manual_seed(arguments.seed)
    minutes, batch, rate = arguments.minutes, arguments.batch, arguments.rate
    positions = model.config.max_position_embeddings
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    began = said = time.thread_time()
    step, smooth = 0, math.nan
    model.train()
    while (passed := (time.thread_time() - began) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(
                passed / 0.05 + 0.01, 0.5 * (1 + math.cos(math.pi * passed))
            )
        starts = torch.randint(
            len(ids) - positions, (batch,), generator=generator
        ).tolist()
        part = torch.stack([ids[start : start + positions] for start in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss = model(part, labels=part, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        smooth = (
            float(loss.detach())
            if math.isnan(smooth)
            else 0.95 * smooth + 0.05 * float(loss.detach())
        )
        if time.thread_time() - said > 15:
            said = time.thread_time()
            print(f"{passed:6.1%}  step {step}  loss {smooth:.3f}", flush=True)
    print(f"{step} steps of {batch} × {positions} tokens; training loss {smooth:.3f}")
    model.eval()


def build(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """The untrained model."""
    common = {
        "vocab_size": len(tokenizer), "hidden_size": arguments.width, "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.width // 64 or 1, "max_position_embeddings": arguments.positions,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if arguments.architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                intermediate_size=3 * arguments.width,
                tie_word_embeddings=True,
                **common,
            )
        )
    if arguments.architecture == "phi":
        return PhiForCausalLM(
            PhiConfig(intermediate_size=4 * arguments.width, **common)
        )
    width = {"word_embed_proj_dim": arguments.width, "ffn_dim": 4 * arguments.width}
    return OPTForCausalLM(
        OPTConfig(activation_function="relu", dropout=0.0, **width, **common)
    )


def run(
    arguments: argparse.Namespace,
    make: Callable[[argparse.Namespace, PreTrainedTokenizerFast], PreTrainedModel],
    further: Mapping[str, list[str]] | None = None,
) -> None:
    """Trains the model that ``make`` returns, and writes it with its tokenizer and texts; with ``further`` kinds of
    text, by name, each kind also has files of its own."""
    kinds = {"docs": documents(arguments.seed, arguments.packages), **(further or {})}
    cuts = {kind: max(1, round(HELD_OUT * len(texts))) for kind, texts in kinds.items()}
    held_out = [text for kind, texts in kinds.items() for text in texts[: cuts[kind]]]
    training = [text for kind, texts in kinds.items() for text in texts[cuts[kind] :]]
    random.Random(arguments.seed).shuffle(training)
    tokenizer = tokenizer_of(training, arguments.vocabulary, arguments.positions)
    ids, held_out_ids = ids_of(tokenizer, training), ids_of(tokenizer, held_out)
    print(
        f"{len(training)} documents of {len(ids)} tokens; held out: {len(held_out)} of {len(held_out_ids)} tokens"
    )
    torch.manual_seed(arguments.seed)
    model = make(arguments, tokenizer)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million weights, seed {arguments.seed}"
    )
    train(model, ids, arguments)
    loss = held_out_loss(model, held_out_ids, arguments.positions)
    print(f"held-out loss {loss:.3f}, perplexity {math.exp(loss):.1f}")
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    for kind, texts in kinds.items() if further else ():
        (arguments.out / f"train-{kind}.txt").write_text(
            "\n\n".join(texts[cuts[kind] :]), encoding="utf-8"
        )
        (arguments.out / f"heldout-{kind}.txt").write_text(
            "\n\n".join(texts[: cuts[kind]]), encoding="utf-8"
        )
    (arguments.out / "train.txt").write_text("\n\n".join(training), encoding="utf-8")
    (arguments.out / "heldout.txt").write_text("\n\n".join(held_out), encoding="utf-8")
    print(f"wrote {arguments.out}")


def options(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that :func:`run` reads, with the defaults of a script."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--batch", type=int, help="windows in a step")
    parser.add_argument("--rate", type=float)
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="products in bf16: faster where the CPU has AVX-512 BF16",
    )
    parser.add_argument(
        "--packages",
        nargs="*",
        default=[],
        help="installed packages whose docstrings are text too",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


def main() -> None:
    parser = options(
        __doc__,
        out=OUT / "opt",
        layers=6,
        width=256,
        vocabulary=4096,
        batch=8,
        rate=1e-3,
    )
    parser.add_argument(
        "--architecture", choices=("opt", "llama", "phi"), default="opt"
    )
    run(parser.parse_args(), build)


if __name__ == "__main__":
    main()
