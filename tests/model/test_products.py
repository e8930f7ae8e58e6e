"""Products in bf16: their error bound, their gradients, the copies of weights, and what decides about them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import sparsellm
from sparsellm.machine import bf16_is_native
from sparsellm.model import products
from sparsellm.model.products import LEAST, Bf16Products
from tests.files.small import shards_of
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

UNIT = 2.0**-8  # the largest relative error of a rounding to bf16


def linear_of(kind: str, inputs: int, outputs: int) -> nn.Linear | Conv1D:
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs) if kind == "linear" else Conv1D(outputs, inputs)
    assert module.weight.numel() >= LEAST
    return module


def exact(module: nn.Linear | Conv1D, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs in fp64, and Σ|x w| of each: three roundings of bf16 lose at most 3.1 units of that sum."""
    weight = module.weight.detach().double()
    weight = weight.T if isinstance(module, nn.Linear) else weight
    assert module.bias is not None
    return (
        x.double() @ weight + module.bias.detach().double(),
        x.double().abs() @ weight.abs(),
    )


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_outputs_and_gradients_err_by_three_roundings_at_most(kind: str) -> None:
    module, x = linear_of(kind, 320, 256), torch.randn(2, 7, 320, requires_grad=True)
    g = torch.randn(2, 7, 256)
    with Bf16Products():
        y = module(x)
    y.backward(g)
    assert y.dtype is torch.float32
    expected, size = exact(module, x.detach())
    assert ((y.detach() - expected).abs() <= 3.1 * UNIT * size + 1e-6).all()
    assert not torch.equal(y.detach(), expected.float()), "nothing was rounded"
    # (out, in)
    weight = (
        module.weight.detach().double()
        if kind == "linear"
        else module.weight.detach().double().T
    )
    rows, given = x.detach().double().flatten(0, 1), g.double().flatten(0, 1)
    assert x.grad is not None
    assert module.weight.grad is not None
    assert module.bias is not None
    assert module.bias.grad is not None
    for gradient, true, size in (
        (x.grad.flatten(0, 1), given @ weight, given.abs() @ weight.abs()),
        (
            module.weight.grad if kind == "linear" else module.weight.grad.T,
            given.T @ rows,
            given.abs().T @ rows.abs(),
        ),
    ):
        assert ((gradient - true).abs() <= 3.1 * UNIT * size + 1e-6).all()
    torch.testing.assert_close(module.bias.grad, g.flatten(0, 1).sum(0))


def test_the_copy_of_a_weight_follows_its_changes() -> None:
    module, mode = linear_of("linear", 320, 256), Bf16Products()
    x = torch.randn(3, 320)
    with torch.no_grad(), mode:
        first, again = module(x), module(x)
        module.weight.mul_(2)
        doubled = module(x)
    assert torch.equal(first, again)
    assert module.bias is not None
    torch.testing.assert_close(doubled - module.bias, 2 * (first - module.bias))


def test_small_and_other_products_stay_as_they_are() -> None:
    small, x = nn.Linear(64, 64), torch.randn(3, 64)
    big, narrow = linear_of("linear", 320, 256), torch.randn(3, 320).bfloat16()
    router, states = nn.Linear(1024, 128), torch.randn(3, 1024)
    with torch.no_grad():
        expected = small(x), big.bfloat16()(narrow), x @ small.weight, router(states)
        with Bf16Products():
            outputs = small(x), big(narrow), x @ small.weight, router(states)
    assert all(
        torch.equal(one, other) for one, other in zip(expected, outputs, strict=True)
    )


def test_attention_errs_by_few_roundings_and_not_by_a_mask_of_numbers() -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 256, 32, requires_grad=True) for heads in (4, 2, 2)
    )
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    for mask in (causal, torch.zeros(256, 256).masked_fill(~causal, -1e9)):
        results = []
        for mode in (contextlib.nullcontext(), Bf16Products()):
            with mode:
                y = functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, enable_gqa=True
                )
            results.append([y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))])
        for true, rounded in zip(*results, strict=True):
            assert rounded.dtype is torch.float32
            assert torch.equal(rounded, true) == (mask is not causal)
            assert (rounded - true).norm() <= 3 * UNIT * true.norm()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # tiny weights are multiplied in bf16, too
    monkeypatch.setattr(products, "LEAST", 1)
    return save_tiny(
        tiny_llama(num_hidden_layers=2), tiny_tokenizer(), tmp_path / "dense"
    )


def run(model: Path, out: Path, kind: str) -> dict[str, bytes]:
    recipe = {
        "sparsity": 0.5,
        "samples": 2,
        "seq_len": 16,
        "products": kind,
        "effort": 0,
    }
    sparsellm.prune(model, {**recipe, "calibration": "pydoc"}, out=out)
    return shards_of(out)


def test_auto_takes_bf16_where_the_processor_has_it(
    source: Path, tmp_path: Path
) -> None:
    auto, narrow, full = (
        run(source, tmp_path / name, name) for name in ("auto", "bfloat16", "float32")
    )
    assert narrow != full
    assert auto == (narrow if bf16_is_native(torch.device("cpu")) else full)


def test_no_run_goes_on_with_other_products(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr("sparsellm.files.writer.CheckpointWriter.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", "float32")
    with pytest.raises(sparsellm.SparseLLMError, match="products in bf16"):
        run(source, tmp_path / "out", "bfloat16")
