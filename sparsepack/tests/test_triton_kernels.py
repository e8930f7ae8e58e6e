"""The GPU's kernel under Triton's interpreter, which has to be chosen before Triton is imported: hence a child."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest

from extension import child
from reference import (
    FLOATS,
    VALUE_TYPES,
    activations,
    bound,
    random_weight,
)
from sparsepack.errors import KernelError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run() -> None:
    """Called in the child."""
    from sparsepack import triton_kernels

    assert triton_kernels.available() == "triton"
    for value_type in VALUE_TYPES:
        # also one column
        shapes = [
            (1, 1, 0.0, "fp32", 64),
            (3, 7, 0.5, "bf16", 32),
            (4, 65, 0.7, "fp16", 32),
        ]
        for out, columns, sparsity, dtype, group in (
            *shapes,
            (2, 300, -1.0, "fp32", 64),
            (4, 600, 0.5, "fp32", 128),
        ):
            packed, dense = random_weight(
                out, columns, value_type, sparsity, seed=columns, group=group
            )
            for tokens in (1, 3, 8, 16) if columns == 65 else (5,):
                x = activations(tokens, columns, FLOATS[dtype], seed=tokens)
                y = triton_kernels.multiply(packed, x)
                assert y.dtype == x.dtype
                # The interpreter cuts an fp32 off to bf16, where a GPU rounds it to nearest: one bit less.
                allowed = bound(dense, x) * (2 if dtype == "bf16" else 1)
                assert bool(
                    ((y.double() - x.double() @ dense.T).abs() <= allowed).all()
                ), (value_type, columns, tokens)
    with pytest.raises(KernelError, match="int99"):
        triton_kernels.multiply(dataclasses.replace(packed, value_type="int99"), x)
    for wrong in (x[:, :-1], x[:0], x.double(), x.repeat(4, 1)):
        with pytest.raises(KernelError):
            triton_kernels.multiply(packed, wrong)


def test_products_are_within_the_error_bound_of_fp32_sums() -> None:
    done = child("from test_triton_kernels import run; run()", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def compiled(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, int],
    warps: int = 4,
) -> str:
    """The PTX of a kernel, compiled without a card. Arguments with a type are multiples of 16; others are any int."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    return str(made.asm["ptx"])


@pytest.mark.parametrize("capability", [75, 120])
def test_a_solver_has_a_kernel_for_old_and_new_cards(capability: int) -> None:
    from sparsellm.method.solvers.panels import BLOCK, PRUNED_TOGETHER, _eliminate

    types = {
        name: "*u8" if name == "kept_pointer" else "*fp32"
        for name in _eliminate.arg_names[:4]
    }
    for n, m in ((0, PRUNED_TOGETHER), (2, 4)):
        assert compiled(
            _eliminate,
            capability,
            types,
            {"N": n, "M": m, "ROWS": PRUNED_TOGETHER, "BLOCK": BLOCK},
        )


@pytest.mark.parametrize(
    ("kind", "values", "scales"),
    [
        (0, "*bf16", "*i64"),
        (1, "*i8", "*fp32"),
        (2, "*u8", "*bf16"),
        (3, "*i8", "*bf16"),
    ],
)
def test_it_compiles_for_a_card_as_it_was_meant(
    kind: int, values: str, scales: str
) -> None:
    """Without a card: eight activations in one load, no warp that waits for another."""
    from sparsepack.triton_kernels import LAUNCH, _multiply

    types = {
        "mask_pointer": "*u8",
        "values_pointer": values,
        "offsets_pointer": "*i64",
        "scales_pointer": scales,
    }
    types["levels_pointer"] = "*i8"
    types |= {
        "x_pointer": "*bf16",
        "y_pointer": "*bf16",
        **dict.fromkeys(("out", "columns", "row_bytes"), "i32"),
    }
    ptx = compiled(
        _multiply,
        80,
        types,
        {"KIND": kind, "TOKENS": 1, "BYTES": LAUNCH["BYTES"]},
        LAUNCH["num_warps"],
    )
    assert ptx.count("ld.global.v4.b32") == 1
    assert "bar.sync" not in ptx
