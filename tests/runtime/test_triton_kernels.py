"""The GPU's kernel under Triton's interpreter, which has to be chosen before Triton is imported: hence a child."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from sparsellm.errors import KernelError
from tests.runtime.reference import FLOATS, VALUE_TYPES, activations, bound, random_weight

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run() -> None:
    """Called in the child."""
    from sparsellm.runtime import triton_kernels

    assert triton_kernels.available() == "triton"
    for value_type in VALUE_TYPES:
        for out, columns, sparsity, dtype in (
            (1, 1, 0.0, "fp32"),
            (3, 7, 0.5, "bf16"),
            (4, 65, 0.7, "fp16"),
            (5, 1100, 0.5, "fp32"),
        ):
            packed, dense = random_weight(out, columns, value_type, sparsity, seed=columns)
            for tokens in (1, 3, 16):
                x = activations(tokens, columns, FLOATS[dtype], seed=tokens)
                y = triton_kernels.multiply(packed, x)
                assert y.dtype == x.dtype
                # The interpreter cuts an fp32 off to bf16, where a GPU rounds it to nearest: one bit less.
                allowed = bound(dense, x) * (2 if dtype == "bf16" else 1)
                assert bool(((y.double() - x.double() @ dense.T).abs() <= allowed).all()), (value_type, columns)
    for wrong in (x[:, :-1], x[:0], x.double(), x.repeat(2, 1)):
        with pytest.raises(KernelError):
            triton_kernels.multiply(packed, wrong)


def test_products_are_within_the_error_bound_of_fp32_sums() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.runtime.test_triton_kernels import run; run()"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_on_a_gpu(value_type: str) -> None:
    import dataclasses

    from sparsellm.runtime import triton_kernels

    packed, dense = random_weight(70, 1100, value_type, 0.5, seed=1)
    moved = {
        name: None if (tensor := getattr(packed, name)) is None else tensor.cuda()
        for name in ("mask", "values", "offsets", "scales")
    }
    for tokens in (1, 16):
        x = activations(tokens, 1100, torch.bfloat16, seed=2)
        y = triton_kernels.multiply(dataclasses.replace(packed, **moved), x.cuda()).cpu()
        assert bool(((y.double() - x.double() @ dense.T).abs() <= bound(dense, x)).all())
