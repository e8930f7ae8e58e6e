"""Rescales the channels of a GGUF file by random factors that cancel, so that its weights leave the types they were in.

    python benchmarks/off_grid.py model-bf16.gguf off-grid.gguf

Weights that once were in 4 bits lie on a grid, and whoever uses the same type finds their numbers again: that flatters
the type. Here a factor between 1/spread and spread multiplies each channel of a norm and divides the columns of the
linears that read it; factors between up and down and between the values and the output of attention do the same. In
exact arithmetic the model computes what it computed; in bf16 it differs by the rounding of the weights. Columns of a
group now have factors of their own, and no scale of a group fits them all. The embedding is left as it is.

For architectures with RMS norms, separate q, k and v, and gate, up and down, as Llama and Qwen2 have.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import gguf
import torch
from torch import Tensor


class Tensors:
    """The tensors of a GGUF file in bf16 and fp32, which are changed in place."""

    def __init__(self, path: Path) -> None:
        self.reader = gguf.GGUFReader(path, "r+")
        self.by_name = {tensor.name: tensor for tensor in self.reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def metadata(self, key: str) -> int:
        """A number of the file's metadata, after the name of the architecture."""
        architecture = self.reader.fields["general.architecture"].contents()
        return int(self.reader.fields[f"{architecture}.{key}"].contents())

    def multiply(self, name: str, rows: Tensor | None, columns: Tensor | None) -> None:
        """Multiplies the rows ``(out)`` and columns ``(in)`` of a tensor, or the values of a vector, its rows."""
        tensor = self.by_name[name]
        stored = torch.from_numpy(tensor.data)
        shape = [int(length) for length in reversed(tensor.shape)]
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            stored = stored.view(torch.bfloat16)
        elif tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            raise ValueError(
                f"{name} is stored as {tensor.tensor_type.name}; pass a file in BF16"
            )
        values = stored.view(shape)
        changed = values.double()
        if rows is not None:
            changed = changed * rows.view(-1, *[1] * (len(shape) - 1))
        if columns is not None:
            changed = changed * columns
        values.copy_(changed)


def factors(count: int, spread: float, generator: torch.Generator) -> Tensor:
    """Factors ``(count)`` of channels, uniform in their logarithm between 1/spread and spread."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.exp((2 * uniform - 1) * math.log(spread))


def move_off_grid(path: Path, spread: float, seed: int) -> None:
    """Rescales the channels of a file, in place."""
    tensors = Tensors(path)
    generator = torch.Generator().manual_seed(seed)
    width = tensors.metadata("embedding_length")
    heads = tensors.metadata("attention.head_count")
    shared = heads // tensors.metadata("attention.head_count_kv")
    for index in range(tensors.metadata("block_count")):
        block = f"blk.{index}"
        for norm, readers in (
            ("attn_norm", ("attn_q", "attn_k", "attn_v")),
            ("ffn_norm", ("ffn_gate", "ffn_up")),
        ):
            channels = factors(width, spread, generator)
            tensors.multiply(f"{block}.{norm}.weight", rows=channels, columns=None)
            for reader in readers:
                tensors.multiply(
                    f"{block}.{reader}.weight", rows=None, columns=1 / channels
                )
        value = tensors.by_name[f"{block}.attn_v.weight"]
        values = factors(int(value.shape[1]), spread, generator)
        tensors.multiply(f"{block}.attn_v.weight", rows=values, columns=None)
        if f"{block}.attn_v.bias" in tensors:
            tensors.multiply(f"{block}.attn_v.bias", rows=values, columns=None)
        size = len(values) * shared // heads
        # each head of values is read by `shared` heads of queries, one after another
        read = values.view(-1, size).repeat_interleave(shared, dim=0).view(-1)
        tensors.multiply(f"{block}.attn_output.weight", rows=None, columns=1 / read)
        up = tensors.by_name[f"{block}.ffn_up.weight"]
        between = factors(int(up.shape[1]), spread, generator)
        tensors.multiply(f"{block}.ffn_up.weight", rows=between, columns=None)
        tensors.multiply(f"{block}.ffn_down.weight", rows=None, columns=1 / between)
    if "output.weight" in tensors:
        channels = factors(width, spread, generator)
        tensors.multiply("output_norm.weight", rows=channels, columns=None)
        tensors.multiply("output.weight", rows=None, columns=1 / channels)
    tensors.reader.data.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a .gguf file in bf16")
    parser.add_argument("out", type=Path)
    parser.add_argument("--spread", type=float, default=1.25)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    shutil.copyfile(asked.source, asked.out)
    move_off_grid(asked.out, asked.spread, asked.seed)


if __name__ == "__main__":
    main()
