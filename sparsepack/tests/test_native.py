from __future__ import annotations

import dataclasses
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from by_hand import exponents_of, packed_of, sparse_weight
from extension import child
from reference import (
    FLOATS,
    INTEGERS,
    VALUE_TYPES,
    activations,
    bound,
    integer_product,
    random_weight,
)
from sparsepack import native
from sparsepack.errors import KernelError
from sparsepack.layout import pack, unpack
from sparsepack.module import threads_set

pytestmark = pytest.mark.skipif(
    not native.instruction_sets(), reason="no compiled kernels"
)

every_kernel = pytest.mark.parametrize("kernel", native.instruction_sets())


@every_kernel
@settings(max_examples=40, deadline=None)
@given(
    value_type=st.sampled_from(VALUE_TYPES),
    out=st.integers(1, 20),
    columns=st.integers(1, 300) | st.just(1030),
    sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    tokens=st.integers(1, 16),
    dtype=st.sampled_from(list(FLOATS.values())),
    data=st.data(),
)
def test_any_shape_is_multiplied_and_unpacked(
    kernel: str,
    value_type: str,
    out: int,
    columns: int,
    sparsity: float,
    tokens: int,
    dtype: torch.dtype,
    data: Any,
) -> None:
    packed, dense = random_weight(
        out, columns, value_type, sparsity, out + columns, special_rows=False
    )
    x = activations(tokens, columns, dtype, columns)
    y = native.multiply(packed, x, kernel=kernel)
    assert bool(((y.double() - x.double() @ dense.T).abs() <= bound(dense, x)).all())
    first = data.draw(st.integers(0, out))
    last = data.draw(st.integers(first, out))
    rows = torch.full((last - first, columns), 7.0, dtype=dtype)
    native.unpack_rows(packed, first, last, rows, kernel=kernel)
    # A code times its scale is rounded to fp32 first, then to the type asked for; all else is exact.
    assert torch.equal(rows, dense[first:last].float().to(dtype))


@every_kernel
@pytest.mark.parametrize("value_type", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_rows_are_converted_as_torch_does(
    kernel: str, value_type: str, dtype: torch.dtype
) -> None:
    """Ties, subnormal numbers, overflow, infinities and NaN, in rows long enough for every loop."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    numbers = (
        bits << 16 | torch.tensor([0, 0x7FFF, 0x8000, 0x8001]).repeat(1 << 14).int()
    ).view(torch.float32)
    dense = numbers.to(FLOATS[value_type]).view(64, 1024)
    kept = dense != 0
    packed = pack(kept.to(dense.dtype), layout="bitmask")
    assert packed is not None
    packed = dataclasses.replace(packed, values=dense[kept])
    rows = torch.empty(64, 1024, dtype=dtype)
    native.unpack_rows(packed, 0, 64, rows, kernel=kernel)
    expected = torch.where(kept, dense, 0).to(dtype)
    assert torch.equal(rows.isnan(), expected.isnan())
    assert torch.equal(rows.nan_to_num(7.0), expected.nan_to_num(7.0))


@every_kernel
@pytest.mark.parametrize("value_type", VALUE_TYPES)
def test_neither_threads_nor_other_tokens_change_a_bit(
    kernel: str, value_type: str
) -> None:
    packed, _ = random_weight(203, 1111, value_type, 0.6, seed=1)
    x = activations(16, 1111, torch.float32, seed=2)
    for rounded in (False, True):
        multiply = partial(native.multiply, packed, rounded=rounded, kernel=kernel)
        with threads_set(1):
            alone = torch.cat([multiply(x[token : token + 1]) for token in range(16)])
        for count in (1, 2, 3, 7):
            with threads_set(count):
                for tokens in (1, 2, 6, 11, 16):
                    assert torch.equal(multiply(x[:tokens]), alone[:tokens])


every_integer = pytest.mark.parametrize("value_type", INTEGERS)
INTEGER_SHAPES = (
    (1, 1, 0.5, 32),
    (2, 33, 0.3, 32),
    (5, 64, -1, 32),
    (11, 197, 0.7, 64),
    (37, 1030, 0.5, 128),
)


@every_kernel
@every_integer
def test_whole_numbers_are_multiplied_exactly(kernel: str, value_type: str) -> None:
    """With scales that are powers of two nothing is rounded, and every bit is that of the formula."""
    for out, columns, sparsity, group in INTEGER_SHAPES:
        packed, _ = random_weight(
            out, columns, value_type, sparsity, seed=columns, group=group
        )
        assert packed.scales is not None
        packed = dataclasses.replace(
            packed,
            scales=torch.exp2(packed.scales.float().mul(2).round()).to(packed.scales),
        )
        x = torch.randint(
            -127, 128, (16, columns), generator=torch.Generator().manual_seed(out)
        ).float()
        x[:, ::4] = 127
        x *= torch.exp2(torch.arange(columns) // 4 % 4)
        for tokens in (1, 2, 7, 16):
            y = native.multiply(packed, x[:tokens], rounded=True, kernel=kernel)
            assert torch.equal(y.double(), integer_product(packed, x[:tokens]))


@every_kernel
@every_integer
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_rounded_products_have_the_same_bits_everywhere(
    kernel: str, value_type: str, dtype: torch.dtype
) -> None:
    for out, columns, sparsity, group in INTEGER_SHAPES:
        packed, dense = random_weight(
            out, columns, value_type, sparsity, seed=columns, group=group
        )
        x = activations(16, columns, dtype, seed=out)
        exact = native.multiply(packed, x.float(), rounded=True, kernel="scalar")
        slack = bound(dense, x.float()) + 2.0**-20 * (x.double().abs() @ dense.abs().T)
        assert bool(
            ((exact.double() - integer_product(packed, x)).abs() <= slack).all()
        )
        expected = exact.to(dtype)
        for tokens in (1, 3, 16):
            assert torch.equal(
                native.multiply(packed, x[:tokens], rounded=True, kernel=kernel),
                expected[:tokens],
            )


@every_kernel
@every_integer
def test_activations_not_finite_or_very_small_are_rounded(
    kernel: str, value_type: str
) -> None:
    packed, _ = random_weight(9, 100, value_type, 0.5, seed=3, special_rows=False)
    x = activations(3, 100, torch.float32, seed=4)
    x[0, 40], x[1, 99], x[2, :66] = float("inf"), float("nan"), 1e-40
    y = native.multiply(packed, x, rounded=True, kernel=kernel)
    assert bool(y[:2].isnan().all())
    x[2, :66] = 0
    assert torch.equal(
        y[2:], native.multiply(packed, x[2:], rounded=True, kernel=kernel)
    )


@every_kernel
@pytest.mark.parametrize("value_type", ["int8", "int6", "int4"])
@pytest.mark.parametrize(
    ("rows", "columns", "sparsity"), [(5, 40, 0.5), (9, 130, 0.0), (16, 320, 0.8)]
)
def test_exponents_scale_inputs_first(
    kernel: str, value_type: str, rows: int, columns: int, sparsity: float
) -> None:
    packed = packed_of(
        sparse_weight(rows, columns, sparsity),
        value_type,
        "auto",
        exponents_of(columns),
    )
    plain, x = dataclasses.replace(packed, exponents=None), torch.randn(3, columns)
    for dtype, roundings in ((torch.float32, (False, True)), (torch.bfloat16, (True,))):
        scaled = x.to(dtype).float() * 2.0 ** exponents_of(columns)
        for rounded in roundings:
            product = native.multiply(
                packed, x.to(dtype), rounded=rounded, kernel=kernel
            )
            assert torch.equal(
                product,
                native.multiply(plain, scaled, rounded=rounded, kernel=kernel).to(
                    dtype
                ),
            )
        dense = torch.empty(rows, columns, dtype=dtype)
        native.unpack_rows(packed, 0, rows, dense, kernel=kernel)
        assert torch.equal(dense, unpack(packed).to(dtype))


TILED = ("bf16", *INTEGERS)
TILES = [
    kernel
    for kernel in native.instruction_sets()
    if native.least_tokens(random_weight(1, 1, "bf16", 0.5, 0)[0], kernel=kernel)
]
every_tiled_kernel = pytest.mark.parametrize("kernel", TILES)
TILED_SHAPES = (
    (1, 1, 0.5, 32),
    (2, 33, 0.3, 32),
    (16, 64, -1, 32),
    (17, 65, 0.99, 64),
    (37, 1030, 0.5, 128),
    (130, 96, 0.0, 32),
    (300, 197, 0.7, 1024),
)


@every_tiled_kernel
@pytest.mark.parametrize("value_type", TILED)
def test_tiles_are_multiplied(kernel: str, value_type: str) -> None:
    for out, columns, sparsity, group in TILED_SHAPES:
        packed, dense = random_weight(
            out, columns, value_type, sparsity, seed=columns, group=group
        )
        if packed.group is not None:  # decoded to bf16
            dense = dense.bfloat16().double()
        for tokens in (1, 15, 16, 17, 48, 530):
            x = activations(tokens, columns, torch.bfloat16, seed=tokens)
            y = native.multiply_tiles(packed, x, kernel=kernel)
            error = (y.double() - x.double() @ dense.T).abs()
            assert bool((error <= bound(dense, x)).all())


@every_tiled_kernel
@pytest.mark.parametrize("value_type", TILED)
def test_tiles_have_every_value_in_its_place(kernel: str, value_type: str) -> None:
    """The product with a unit matrix is the weight, bit for bit."""
    for out, columns, sparsity, group in TILED_SHAPES:
        packed, dense = random_weight(
            out, columns, value_type, sparsity, seed=columns, group=group
        )
        unit = torch.eye(columns, dtype=torch.bfloat16)
        product = native.multiply_tiles(packed, unit, kernel=kernel)
        assert torch.equal(product.t(), dense.float().bfloat16())


@every_tiled_kernel
@pytest.mark.parametrize("value_type", TILED)
def test_neither_threads_nor_other_tokens_change_a_bit_of_tiles(
    kernel: str, value_type: str
) -> None:
    packed, _ = random_weight(203, 1111, value_type, 0.6, seed=1)
    x = activations(545, 1111, torch.bfloat16, seed=2)
    multiply = partial(native.multiply_tiles, packed, kernel=kernel)
    with threads_set(1):
        alone = torch.cat([multiply(row) for row in x.split(1)])
    for count in (1, 2, 3, 7):
        with threads_set(count):
            for tokens in (2, 16, 17, 40, 545):
                assert torch.equal(multiply(x[:tokens]), alone[:tokens])


@every_tiled_kernel
@pytest.mark.parametrize("value_type", ["int8", "int6", "int4"])
def test_exponents_scale_the_inputs_of_tiles(kernel: str, value_type: str) -> None:
    packed = packed_of(
        sparse_weight(9, 130, 0.5), value_type, "auto", exponents_of(130)
    )
    plain = dataclasses.replace(packed, exponents=None)
    x = activations(20, 130, torch.bfloat16, seed=1)
    scaled = (x.float() * 2.0 ** exponents_of(130)).bfloat16()
    assert torch.equal(
        native.multiply_tiles(packed, x, kernel=kernel),
        native.multiply_tiles(plain, scaled, kernel=kernel),
    )


@every_tiled_kernel
def test_activations_not_finite_reach_the_products_of_tiles(kernel: str) -> None:
    packed, _ = random_weight(9, 100, "int4", 0.0, seed=3, special_rows=False)
    x = activations(20, 100, torch.bfloat16, seed=4)
    before = native.multiply_tiles(packed, x, kernel=kernel)
    x[3, 40] = float("nan")
    y = native.multiply_tiles(packed, x, kernel=kernel)
    assert bool(y[3].isnan().all())
    others = [token for token in range(20) if token != 3]
    assert torch.equal(y[others], before[others])


@every_tiled_kernel
def test_tiles_leave_those_of_torch_alone(kernel: str) -> None:
    """Its library configures the processor's tiles for itself."""
    packed, _ = random_weight(40, 128, "int8", 0.5, seed=1)
    x = activations(33, 128, torch.bfloat16, seed=2)
    weight = activations(40, 128, torch.bfloat16, seed=3)
    before = torch.nn.functional.linear(x, weight)
    for _ in range(3):
        native.multiply_tiles(packed, x, kernel=kernel)
        assert torch.equal(torch.nn.functional.linear(x, weight), before)


def test_what_has_no_tiles_is_refused() -> None:
    packed, _ = random_weight(5, 70, "int8", 0.5, seed=1)
    x = activations(20, 70, torch.bfloat16, seed=2)
    assert native.least_tokens(packed, kernel="scalar") is None
    with pytest.raises(KernelError, match="no tiles for int8 with scalar"):
        native.multiply_tiles(packed, x, kernel="scalar")
    for wrong in (x[:, :69], x[:0], x[0], x.float(), x.to("meta")):
        with pytest.raises(KernelError, match="tiles take"):
            native.multiply_tiles(packed, wrong)
    for kernel in TILES:
        halves, _ = random_weight(5, 70, "fp16", 0.5, seed=1)
        with pytest.raises(KernelError, match="no tiles for fp16"):
            native.multiply_tiles(halves, x, kernel=kernel)
        with pytest.raises(KernelError, match="the kernels take bitmasks on the CPU"):
            native.multiply_tiles(packed.to("meta"), x, kernel=kernel)


@every_kernel
def test_values_of_floating_types_are_never_rounded(kernel: str) -> None:
    packed, _ = random_weight(9, 100, "bf16", 0.5, seed=3)
    x = activations(3, 100, torch.float32, seed=4)
    plain = native.multiply(packed, x, kernel=kernel)
    assert torch.equal(native.multiply(packed, x, rounded=True, kernel=kernel), plain)


def test_flushing_subnormals_in_torch_changes_nothing() -> None:
    packed, _ = random_weight(2, 100, "fp16", 0.5, seed=5)
    packed = dataclasses.replace(packed, values=packed.values * 2.0**-16)
    x = activations(1, 100, torch.float32, seed=6)
    before = native.multiply(packed, x)
    try:
        torch.set_flush_denormal(True)
        assert torch.equal(native.multiply(packed, x), before)
    finally:
        torch.set_flush_denormal(False)


def test_results_are_rounded_to_nearest_even() -> None:
    packed, _ = random_weight(1, 2, "fp32", 0.0, seed=0, special_rows=False)
    weights = [
        0.0,
        1e-6,
        2.0**-14 - 2.0**-26,
        65519.0,
        65520.0,
        3.3e38,
        *torch.linspace(-3, 3, 110).tolist(),
    ]
    for dtype in (torch.bfloat16, torch.float16):
        for weight in weights:
            value = torch.tensor([weight, 0.0])
            y = native.multiply(
                dataclasses.replace(packed, values=value),
                torch.tensor([[1.0, 0.0]], dtype=dtype),
            )
            assert torch.equal(y.view(1), value[:1].to(dtype))


OTHER_PROCESS = """
import os, sys, threading, torch
from sparsepack import native
from reference import activations, random_weight
packed, _ = random_weight(400, 512, "bf16", 0.5, seed=1)
x = activations(4, 512, torch.float32, seed=2)
torch.set_num_threads(3)
for openmp in (True, False):
    if not openmp:
        native._library().use_openmp(0)
    expected = native.multiply(packed, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native.multiply(packed, x), expected) else 3)
    if os.waitpid(child, 0)[1]:
        sys.exit("the child is wrong")
    wrong = []
    def work():
        wrong.extend(1 for _ in range(50) if not torch.equal(native.multiply(packed, x), expected))
    workers = [threading.Thread(target=work) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert not wrong
"""


def test_forked_children_and_python_threads_multiply() -> None:
    done = child(OTHER_PROCESS)
    assert done.returncode == 0, done.stderr


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = random_weight(5, 70, "int8", 0.5, seed=1)
    # it is remembered
    monkeypatch.setattr(native, "available", native.available.__wrapped__)
    monkeypatch.setenv("SPARSELLM_KERNEL", "")
    assert native.available() == native.instruction_sets()[0]
    monkeypatch.setenv("SPARSELLM_KERNEL", "scalar")
    assert native.available() == "scalar"
    monkeypatch.setenv("SPARSELLM_KERNEL", "torch")
    assert native.available() is None
    with pytest.raises(KernelError, match="SPARSELLM_KERNEL=torch"):
        native.multiply(packed, activations(2, 70, torch.float32, seed=2))
    monkeypatch.setenv("SPARSELLM_KERNEL", "scaler")
    with pytest.raises(KernelError, match="choose one of"):
        native.available()


def test_what_does_not_fit_is_refused() -> None:
    packed, _ = random_weight(5, 70, "int8", 0.5, seed=1)
    x = activations(2, 70, torch.float32, seed=2)
    for wrong in (x[:, :69], x[:0], x.repeat(9, 1), x.double(), x[0]):
        with pytest.raises(KernelError):
            native.multiply(packed, wrong)
    for changed in (dataclasses.replace(packed, layout="nm"), packed.to("meta")):
        with pytest.raises(KernelError, match="the kernels take bitmasks on the CPU"):
            native.multiply(changed, x)
    for rows in (torch.empty(6, 70), torch.empty(2, 71)):
        with pytest.raises(KernelError):
            native.unpack_rows(packed, 0, len(rows), rows)
    with pytest.raises(KernelError, match="avx3"):
        native.multiply(packed, x, kernel="avx3")


def test_activations_that_are_not_contiguous() -> None:
    packed, dense = random_weight(5, 70, "fp32", 0.5, seed=1)
    x = activations(70, 2, torch.float32, seed=2).T
    assert bool(
        (
            (native.multiply(packed, x).double() - x.double() @ dense.T).abs()
            <= bound(dense, x)
        ).all()
    )


@pytest.mark.parametrize("interface", [None, lambda: native.INTERFACE - 1])
def test_an_extension_of_another_release_is_refused(
    interface: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would read the scales of groups as those of rows."""
    older = ModuleType("_kernels")
    if interface is not None:
        older.interface = interface  # type: ignore[attr-defined]
    monkeypatch.setattr(native, "extension", lambda: older)
    with pytest.raises(KernelError, match="another release of sparsepack"):
        native._library.__wrapped__()
