"""A program with the command line of llama.cpp's converter, for tiny models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def convert(checkpoint: Path, out: Path, options: list[str]) -> None:
    """Writes the GGUF file of a checkpoint, as a call of the program with these options does."""
    from transformers import AutoModelForCausalLM

    from tests.models.in_gguf import Kind, write_gguf

    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab-only", action="store_true")
    parser.add_argument("--outtype", default="f16")
    parser.add_argument("--model-name")
    settings = parser.parse_args(options)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    if model.config.model_type not in ("llama", "mixtral"):
        raise SystemExit(f"Model {model.config.model_type} is not supported")
    kind = Kind[settings.outtype.upper()]
    write_gguf(model, out, kind, weights=not settings.vocab_only)


def called(_: Path, checkpoint: Path, out: Path, options: list[str]) -> None:
    """Does what the program does, in this process: a new one would import torch."""
    convert(checkpoint, out, options)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    out = sys.argv.index("--outfile")
    convert(Path(sys.argv[1]), Path(sys.argv[out + 1]), sys.argv[2:out])
