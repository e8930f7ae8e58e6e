"""Damaged packed files against the kernels, built with the address and undefined-behaviour sanitizers.

    nice python sparsepack/tests/fuzz.py [--files 20000] [--seed 0]

Every round writes a small packed checkpoint of one layout and value type with a few bytes changed, in the header, in a
tensor or in config.json. It must be refused with an error of this library, or read; what is read is multiplied by every
instruction set, with exact and with rounded activations, and unpacked. The results must be those of plain torch on the
same tensors. A sanitizer ends the process at the first wrong access."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from extension import built, use

SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]
SHAPES = ((3, 40), (5, 65), (8, 200))


def fuzz(extension: Path, files: int, seed: int) -> None:
    """Called in a child, where the sanitizers' library is loaded first."""
    use(extension)
    import torch

    from sparsepack import PackError
    from sparsepack.checkpoint import open_packed

    torch.manual_seed(seed)
    torch.set_num_threads(2)
    chosen = random.Random(seed)
    outcomes: Counter[str] = Counter()
    originals = checkpoints()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        for turn in range(files):
            content, config = chosen.choice(originals)
            changed, text = bytearray(content), config.encode()
            header = 8 + int.from_bytes(content[:8], "little")
            if chosen.random() < 0.1:
                text = damaged(bytearray(text), 0, len(text), chosen)
            else:
                inside = (
                    (header, len(content)) if chosen.random() < 0.8 else (0, header)
                )
                changed = bytearray(damaged(changed, *inside, chosen))
            (directory / "model.safetensors").write_bytes(changed)
            (directory / "config.json").write_bytes(text)
            try:
                packed = open_packed([directory / "model.safetensors"]).packed("w")
            except (PackError, KeyError) as error:
                # the entry itself has another name now
                if isinstance(error, KeyError) and error.args != ("w",):
                    raise
                outcomes["refused"] += 1
                continue
            check(packed)
            outcomes["read, and right"] += 1
            if turn % 1000 == 0:
                sys.stdout.write(f"{turn} {dict(outcomes)}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{files} files: {dict(outcomes)}; no crash and no wrong number\n")


def checkpoints() -> list[tuple[bytes, str]]:
    """The content of a weight file, and of config.json, for every shape, layout and value type."""
    import torch
    from safetensors.torch import save

    from sparsepack.checkpoint import PackedEntry, quantization_config
    from sparsepack.codes import GAPPED, WRITTEN_TYPES
    from sparsepack.layout import pack

    made = []
    for (out, columns), layout, values in itertools.product(
        SHAPES, ("bitmask", "nm", "dense"), WRITTEN_TYPES
    ):
        weight = torch.randn(out, columns // 8 * 8 if layout == "nm" else columns)
        if layout == "nm":
            weight = weight * torch.tensor([0, 1, 1, 0]).repeat(weight.shape[1] // 4)
        elif layout == "bitmask":
            if values in GAPPED:  # on the grid with a gap, so that it has levels
                numbers = torch.tensor(GAPPED[values].numbers)
                weight = numbers[torch.randint(len(numbers), weight.shape)] * 0.5
            weight[torch.rand(weight.shape) < 0.5] = 0
            weight[:, ::32] = -64.0
        exponents = torch.randint(-8, 8, weight.shape[1:]).to(torch.int8)
        packed = pack(weight * 2.0**exponents, values, layout, exponents=exponents)
        assert packed is not None
        assert (packed.levels is not None) == (layout == "bitmask" and values in GAPPED)
        tensors = {
            f"w.weight_{name}": tensor.contiguous()
            for name, tensor in packed.stored.items()
        }
        config = quantization_config({"w": PackedEntry.of(packed, torch.float32)})
        made.append(
            (
                save({**tensors, "w.weight": torch.zeros(1)}),
                json.dumps({"quantization_config": config}),
            )
        )
    return made


def damaged(content: bytearray, first: int, last: int, chosen: random.Random) -> bytes:
    """Some bytes changed between ``first`` and ``last``: a bit, any byte, or one that is often a limit."""
    for _ in range(chosen.randint(1, 3)):
        at = chosen.randrange(first, last)
        content[at] = chosen.choice(
            [
                content[at] ^ 1 << chosen.randrange(8),
                chosen.randrange(256),
                0,
                127,
                128,
                255,
            ]
        )
    return bytes(content)


def check(packed: object) -> None:
    """Every kernel against plain torch, on a weight that passed the checks."""
    import torch

    from reference import activations, bound
    from sparsepack import native
    from sparsepack.layout import PackedWeight, as_bitmask, unpack

    assert isinstance(packed, PackedWeight)
    weight = as_bitmask(packed)
    dense = unpack(weight, torch.float32)
    x = activations(3, weight.shape[1], torch.float32, 0)
    exact, slack = x.double() @ dense.double().T, bound(dense.double(), x)
    rounded = native.multiply(weight, x, rounded=True, kernel="scalar")
    # a changed exponent may overflow fp32
    usual = exact.isfinite() & (exact.abs() < 1e37) & (slack < 1e30)
    for kernel in native.instruction_sets():
        rows = torch.empty_like(dense)
        native.unpack_rows(weight, 0, len(dense), rows, kernel=kernel)
        assert torch.equal(rows.nan_to_num(7.0), dense.nan_to_num(7.0)), kernel
        assert bool(
            (
                (native.multiply(weight, x, kernel=kernel).double() - exact).abs()
                <= slack
            )[usual].all()
        ), kernel
        if weight.scales is not None:
            result = native.multiply(weight, x, rounded=True, kernel=kernel)
            assert torch.equal(result.nan_to_num(7.0), rounded.nan_to_num(7.0)), kernel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extension", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.extension is not None:
        fuzz(arguments.extension, arguments.files, arguments.seed)
        return
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        extension = built(Path(folder), compiler, "-O1", "-g", *SANITIZERS)
        libraries = [
            subprocess.run(
                [compiler, f"-print-file-name={name}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for name in ("libasan.so", "libubsan.so")
        ]
        options = {
            "LD_PRELOAD": " ".join(map(str.strip, libraries)),
            "ASAN_OPTIONS": "detect_leaks=0",
        }
        command = [
            sys.executable,
            __file__,
            "--extension",
            str(extension),
        ]
        command += ["--files", str(arguments.files), "--seed", str(arguments.seed)]
        sys.exit(subprocess.run(command, env={**os.environ, **options}).returncode)


if __name__ == "__main__":
    main()
