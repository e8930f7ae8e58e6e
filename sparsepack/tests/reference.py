"""A packer written for clearness alone, bit by bit, and the dense weight it stands for: what kernels are held to."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from sparsepack.layout import PackedWeight, unpack
from sparsepack.module import PackedLinear

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUPED_BYTES = "int8 in groups"  # what int6 and int5 are in memory
INTEGERS = ("int8", GROUPED_BYTES, "int4")
VALUE_TYPES = (*FLOATS, *INTEGERS)


def random_weight(
    out: int,
    columns: int,
    value_type: str,
    sparsity: float,
    seed: int,
    *,
    special_rows: bool = True,
    group: int = 64,
) -> tuple[PackedWeight, Tensor]:
    """A random packed weight and its dense form in fp64.

    With ``special_rows``, the first row is empty, the second full and the last empty. A sparsity below 0 is the layout
    ``dense``. ``group`` columns share a scale of int4, whose numbers are random with an even seed, else plain, and of
    :data:`GROUPED_BYTES`, whose numbers are any."""
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand(out, columns, generator=random) >= sparsity
    if special_rows and sparsity >= 0:
        kept[0] = False
        kept[min(1, out - 1)] = True
        kept[-1] = out == 2
    scales = levels = None
    stored = kept.sum(dim=1)  # values of each row
    if value_type in FLOATS:
        numbers = torch.randn(out, columns, generator=random).to(FLOATS[value_type])
        values, dense = numbers[kept], numbers.double()
    elif value_type == "int8":
        codes = torch.randint(-127, 128, (out, columns), generator=random).to(
            torch.int8
        )
        scales = torch.rand(out, generator=random) + 0.01
        values, dense = codes[kept], codes * scales.double()[:, None]
    elif value_type == GROUPED_BYTES:
        codes = torch.randint(-128, 128, (out, columns), generator=random)
        scales = torch.rand(out, -(-columns // group), generator=random).bfloat16()
        of_columns = scales.double().repeat_interleave(group, dim=1)[:, :columns]
        values = codes[kept].to(torch.int8)
        dense = codes * of_columns
        value_type = "int8"
    else:
        if seed % 2 == 0:
            levels = torch.randint(-128, 128, (16,), generator=random).to(torch.int8)
        codes = torch.randint(0, 16, (out, columns), generator=random)
        scales = (
            torch.rand(out, -(-columns // group), generator=random) + 0.01
        ).bfloat16()
        numbers = (torch.arange(-8, 8) if levels is None else levels)[codes]
        dense = numbers * scales.double().repeat_interleave(group, dim=1)[:, :columns]
        rows = [
            functional.pad(row[some], (0, int(some.sum()) % 2))
            for row, some in zip(codes, kept, strict=True)
        ]
        pairs = torch.cat(rows).view(-1, 2)
        values = (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8)
        stored += stored % 2
    bits = functional.pad(kept, (0, -columns % 64)).view(out, -1, 8)
    mask = (bits * 2 ** torch.arange(8)).sum(dim=2).to(torch.uint8)
    layout, mask = ("bitmask", mask) if sparsity >= 0 else ("dense", mask[:1].clone())
    offsets = functional.pad(stored.cumsum(dim=0), (1, 0))
    return PackedWeight(
        (out, columns), layout, mask, values, offsets, scales, value_type, levels=levels
    ), dense * kept


def activations(tokens: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(
        tokens, columns, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def bound(dense: Tensor, x: Tensor) -> Tensor:
    """How far a product ``(tokens, out)`` in fp32 may be from the exact one, then rounded to the type of ``x``: by
    ``(n + 3) u Σ|w x|`` with u = 2⁻²⁴ (Higham, section 3.1), and ``2⁻ᵏ |y|`` by a rounding to k bits."""
    exact = (x.double() @ dense.T).abs()
    rounding = {
        torch.float32: 2.0**-24,
        torch.bfloat16: 2.0**-8,
        torch.float16: 2.0**-11,
    }[x.dtype]
    return (
        (dense.shape[1] + 3) * 2.0**-24 * (x.double().abs() @ dense.abs().T)
        + rounding * exact
        + 2.0**-24
    )


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations ``(tokens, in)`` as whole numbers ``(tokens, groups, 4)`` and fp32 scales ``(tokens, groups)``.
    Groups of four columns that lie 64, 128 or 192 columns apart within 256 share a scale."""
    padded = functional.pad(x.float(), (0, -x.shape[1] % 256)).view(
        len(x), -1, 4, 16, 4
    )
    largest = padded.abs().amax(dim=(2, 4), keepdim=True)
    integers = (
        torch.where(largest > 0, padded * torch.tensor(127.0).div(largest), 0)
        .round()
        .long()
    )
    scales = (largest / 127).expand(-1, -1, 4, -1, 1)
    groups = -(-x.shape[1] // 4)
    return integers.reshape(len(x), -1, 4)[:, :groups], scales.reshape(len(x), -1)[
        :, :groups
    ]


def integer_product(packed: PackedWeight, x: Tensor) -> Tensor:
    """``x Wᵀ`` in fp64 with rounded activations: sums of whole numbers times their scales; ``W`` is of integers."""
    assert packed.scales is not None
    plain = unpack(dataclasses.replace(packed, scales=torch.ones_like(packed.scales)))
    width = packed.group or packed.shape[1]
    scales = (
        packed.scales.view(len(plain), -1)
        .double()
        .repeat_interleave(width, dim=1)[:, : packed.shape[1]]
    )
    codes = functional.pad(plain.long(), (0, -packed.shape[1] % 4)).unflatten(
        1, (-1, 4)
    )
    integers, of_x = rounded(x)
    products = torch.einsum("tgk,ogk->tog", integers, codes)  # int64
    return (products.double() * of_x.double().unsqueeze(1) * scales[:, ::4]).sum(dim=2)


def layer_of(
    packed: PackedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> PackedLinear:
    """A layer around a packed weight."""
    layer = PackedLinear(
        packed.shape[1], packed.shape[0], bias is not None, dtype=dtype
    )
    layer.set_packed(packed)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.to(layer.weight))
    return layer
