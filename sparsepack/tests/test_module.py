"""The module against the dense linear it stands for: products, moves, state, compilation, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from by_hand import exponents_of, packed_of, sparse_weight
from reference import layer_of
from sparsepack import module as runtime_module
from sparsepack.codes import VALUE_TYPES
from sparsepack.errors import FormatError, PackError
from sparsepack.layout import FIELDS, PackedWeight, unpack
from sparsepack.module import PackedEmbedding, PackedLinear, multiply


def layer(values: str = "keep", *, exponents: bool = False) -> PackedLinear:
    packed = packed_of(
        sparse_weight(48, 130, 0.6),
        values,
        exponents=exponents_of(130) if exponents else None,
    )
    return layer_of(packed, torch.randn(48), torch.float32)


WITH_EXPONENTS = [
    *((values, False) for values in VALUE_TYPES),
    ("int8", True),
    ("int6", True),
    ("int5", False),
    ("int4", True),
]


@pytest.mark.parametrize(("values", "exponents"), WITH_EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_that_of_the_dense_weight(
    values: str, exponents: bool, dtype: torch.dtype
) -> None:
    """In fp64; fp32 sums and one rounding to the output's type are what may differ."""
    packed = layer(values, exponents=exponents).packed
    dense = unpack(packed).double().t()
    # bf16 rounds weight and result to 8 bits
    bound = 2e-6 if dtype == torch.float32 else 2.0**-7
    for tokens in (1, 16, 17, 40):
        x = torch.randn(tokens, 130).to(dtype)
        product = multiply(packed, x)
        assert product.dtype == dtype
        slack = bound * (x.double().abs() @ dense.abs()) + 1e-12
        assert ((product.double() - x.double() @ dense).abs() <= slack).all()


@pytest.mark.parametrize("tile", [1, 130 * 7, 130 * 100, 1 << 20])
def test_tiles_do_not_change_the_product(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_module, "_kernels", lambda device: None)
    monkeypatch.setattr(runtime_module, "TILE", tile)
    weight, x = sparse_weight(148, 130, 0.6), torch.randn(20, 130)
    assert torch.allclose(multiply(packed_of(weight), x), x @ weight.t(), atol=1e-5)


@pytest.mark.parametrize("tile", [1, 130 * 7, 130 * 100, 1 << 20])
@pytest.mark.parametrize("tokens", [17, 32, 33])
def test_few_tokens_are_the_right_factor(
    tile: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 32 tokens in bf16, where the kernels have no tiles; every tile is the left factor then, and the product is
    that of the dense weight."""
    monkeypatch.setattr(runtime_module, "_takes_tiles", lambda *_: False)
    left = []
    product = torch.mm

    def recorded(a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        left.append(len(a))
        return product(a, b, **options)

    monkeypatch.setattr(runtime_module, "TILE", tile)
    monkeypatch.setattr(runtime_module, "FEW_TILE", tile)
    monkeypatch.setattr(torch, "mm", recorded)
    packed = packed_of(sparse_weight(148, 130, 0.6).bfloat16())
    x = torch.randn(tokens, 130).bfloat16()
    y = multiply(packed, x)
    exact = x.double() @ unpack(packed).double().t()
    slack = 2.0**-7 * (x.double().abs() @ unpack(packed).double().abs().t()) + 1e-12
    assert ((y.double() - exact).abs() <= slack).all()
    if tokens <= 32:
        assert sum(left) == 148
    else:
        assert set(left) == {tokens}


def test_small_batches_go_to_the_kernel_large_ones_use_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def product(packed: PackedWeight, x: Tensor, **_: bool) -> Tensor:
        asked.append(("multiply", len(x)))
        return x @ unpack(packed, x.dtype).t()

    def rows(packed: PackedWeight, first: int, last: int, out: Tensor) -> None:
        asked.append(("rows", last - first))
        out.copy_(unpack(packed, out.dtype)[first:last])

    kernels = SimpleNamespace(
        multiply=product,
        unpack_rows=rows,
        available=lambda: "abacus",
        least_tokens=lambda packed: None,
    )
    monkeypatch.setattr(runtime_module, "_kernels", lambda device: kernels)
    module = layer()
    dense = copy.deepcopy(module).to_dense()
    for tokens, called in (
        (1, ("multiply", 1)),
        (16, ("multiply", 16)),
        (17, ("rows", 48)),
    ):
        asked.clear()
        x = torch.randn(tokens, 130)
        assert torch.allclose(module(x), dense(x), atol=1e-5)
        assert asked == [called]
    assert runtime_module.kernel_name() == "abacus"


@pytest.mark.parametrize("least", [None, 4, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_kernels_begin_where_they_are_faster(
    least: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def named(name: str) -> Callable[..., Tensor]:
        def product(packed: PackedWeight, x: Tensor, **_: bool) -> Tensor:
            asked.append(name)
            return x @ unpack(packed, x.dtype).t()

        return product

    def rows(packed: PackedWeight, first: int, last: int, out: Tensor) -> None:
        asked.append("rows")
        out.copy_(unpack(packed, out.dtype)[first:last])

    kernels = SimpleNamespace(
        multiply=named("multiply"),
        multiply_tiles=named("tiles"),
        unpack_rows=rows,
        least_tokens=lambda packed: least,
    )
    monkeypatch.setattr(runtime_module, "_kernels", lambda device: kernels)
    packed = packed_of(sparse_weight(48, 130, 0.6))
    for tokens in (1, 4, 16, 17, 20, 1000):
        asked.clear()
        multiply(packed, torch.randn(tokens, 130).to(dtype))
        expected = "multiply" if tokens <= 16 else "rows"
        if dtype == torch.bfloat16 and least is not None and tokens >= least:
            expected = "tiles"
        assert asked == [expected]


@pytest.mark.parametrize("shape", [(130,), (0, 130), (2, 5, 130), (2, 3, 4, 130)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    module, x = layer(), torch.randn(shape)
    assert module(x).shape == (*shape[:-1], 48)
    assert torch.allclose(module(x), module.to_dense()(x), atol=1e-5)
    # no kernel: fp64
    assert torch.allclose(
        module.double()(x.double()), module.to_dense()(x.double()), atol=1e-12
    )


def test_dtype_changes_leave_the_values_alone() -> None:
    module = layer("fp32").type(torch.float32)
    before = unpack(module.packed)
    for changed in (
        module.bfloat16(),
        module.half(),
        module.double(),
        module.to(torch.bfloat16),
    ):
        assert changed is module
        assert torch.equal(unpack(module.packed), before)
        assert module.weight_values.dtype == torch.float32  # type: ignore[union-attr]
        assert module.weight_offsets.dtype == torch.int64  # type: ignore[union-attr]
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert module(torch.randn(2, 130).bfloat16()).dtype == torch.bfloat16
    assert module.to("meta").weight_mask.is_meta  # type: ignore[union-attr]


@pytest.mark.parametrize(("values", "exponents"), WITH_EXPONENTS)
def test_state_goes_into_a_layer_that_holds_another_weight(
    values: str, exponents: bool
) -> None:
    module, other = layer(values, exponents=exponents), PackedLinear(130, 48)
    other.set_packed(packed_of(sparse_weight(48, 130, 0.9, seed=5)))
    result = other.load_state_dict(module.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert other.weight_values.data_ptr() != module.weight_values.data_ptr()  # type: ignore[union-attr]
    x = torch.randn(3, 130)
    assert torch.equal(other(x), module(x))
    fresh = PackedLinear(130, 48)
    fresh.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(fresh(x), module(x))


def test_damaged_state_is_refused_and_changes_nothing() -> None:
    module = layer()
    state = module.state_dict()
    state["weight_offsets"] = state["weight_offsets"] + 1
    before = unpack(module.packed)
    with pytest.raises(RuntimeError, match="first offset is 1"):
        module.load_state_dict(state)
    assert torch.equal(unpack(module.packed), before)
    with pytest.raises(
        RuntimeError, match="mask, values and offsets are loaded together"
    ):
        module.load_state_dict(
            {"weight_mask": state["weight_mask"].roll(1, 0)}, strict=False
        )
    assert torch.equal(unpack(module.packed), before)
    with pytest.raises(RuntimeError, match="weight_mask"):
        module.load_state_dict({"weight": torch.zeros(1), "bias": torch.zeros(48)})


def test_a_layer_without_a_weight_says_so() -> None:
    with pytest.raises(PackError, match="no weight yet"):
        PackedLinear(8, 8)(torch.randn(1, 8))
    assert "no weight" in repr(PackedLinear(8, 8))
    with pytest.raises(FormatError, match="shape"):
        PackedLinear(8, 8).set_packed(layer().packed)


@pytest.mark.parametrize(
    ("values", "exponents"), [("bf16", False), ("int8", True), ("int4", True)]
)
def test_gradient_of_the_input_is_that_of_the_dense_layer(
    values: str, exponents: bool
) -> None:
    module = layer(values, exponents=exponents)
    module.requires_grad_(False)
    dense = copy.deepcopy(module).to_dense()
    x = torch.randn(2, 3, 130, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    module(x).square().sum().backward()
    dense(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", ["keep", "int8", "int4"])
def test_a_compiled_model_is_one_graph_with_the_same_bits(values: str) -> None:
    torch.compiler.reset()  # the cases before this one count as its recompilations
    embedding = nn.Embedding(40, 130)
    embed = PackedEmbedding(embedding)
    embed.set_packed(packed_of(embedding.weight, "int8", "dense"))
    model = nn.Sequential(
        embed,
        layer(values, exponents=values != "keep"),
        nn.ReLU(),
        layer_of(packed_of(sparse_weight(16, 48, 0.5), "int4")),
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for tokens in (20, 3, 1):
            ids = torch.arange(tokens)
            if tokens > 1:  # any number of tokens runs one graph
                torch._dynamo.mark_dynamic(ids, 0)
            assert torch.equal(compiled(ids), model(ids))


def test_a_compiled_layer_has_the_gradient_of_the_input() -> None:
    module = layer("int8", exponents=True).requires_grad_(False)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 130, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    compiled(x).square().sum().backward()
    module(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_the_operators_shapes_are_those_of_their_results() -> None:
    packed = layer("int4", exponents=True).packed
    parts = [getattr(packed, field) for field in FIELDS]
    operators = torch.ops.sparsepack
    x = torch.randn(3, 130).bfloat16()
    for name, arguments in (
        ("multiply", (x, *parts, False)),
        ("unpack", (*parts, 130, torch.bfloat16)),
    ):
        torch.library.opcheck(
            getattr(operators, name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
