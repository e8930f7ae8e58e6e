"""Exponents of columns: every kernel, the decoder and the module against the same weight without them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparsellm
from sparsellm.errors import StorageError
from sparsepack import native
from sparsepack.codes import text_of_exponents
from sparsepack.decode import Decoder, why_not
from sparsepack.errors import FormatError
from sparsepack.layout import PackedWeight, pack, unpack
from sparsepack.module import PackedEmbedding, PackedLinear, multiply
from sparsepack.validation import validate
from tests.packed.by_hand import int4_by_hand, sparse_weight
from tests.runtime.reference import layer_of

KERNELS = native.instruction_sets()


def exponents_of(columns: int) -> Tensor:
    return torch.arange(columns).mul(7).remainder(16).sub(8).to(torch.int8)


def packed_of(rows: int, columns: int, values: str, sparsity: float) -> PackedWeight:
    packed = pack(sparse_weight(rows, columns, sparsity), values, exponents=exponents_of(columns))
    assert packed is not None
    validate(packed, "w")
    return packed


@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_int4_is_what_the_format_says(sparsity: float) -> None:
    packed = pack(sparse_weight(6, 100, sparsity), "int4", "bitmask", exponents=exponents_of(100))
    assert packed is not None
    assert torch.equal(unpack(packed), int4_by_hand(packed) * 2.0 ** exponents_of(100))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "columns", "sparsity"), [(5, 40, 0.5), (9, 130, 0.0), (16, 320, 0.8)])
def test_kernels_multiply_activations_first(kernel: str, values: str, rows: int, columns: int, sparsity: float) -> None:
    packed = packed_of(rows, columns, values, sparsity)
    plain = dataclasses.replace(packed, exponents=None)
    x = torch.randn(3, columns)
    scaled = x * 2.0 ** exponents_of(columns)
    for rounded in (False, True):
        found = native.multiply(packed, x, rounded=rounded, kernel=kernel)
        assert torch.equal(found, native.multiply(plain, scaled, rounded=rounded, kernel=kernel))
    half = x.bfloat16()
    found = native.multiply(packed, half, rounded=True, kernel=kernel)
    expected = native.multiply(plain, half.float() * 2.0 ** exponents_of(columns), rounded=True, kernel=kernel)
    assert torch.equal(found, expected.bfloat16())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense = torch.empty(rows, columns, dtype=dtype)
        native.unpack_rows(packed, 0, rows, dense, kernel=kernel)
        assert torch.equal(dense, unpack(packed).to(dtype))


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_layer_is_that_of_its_dense_weight(values: str) -> None:
    packed = packed_of(24, 96, values, 0.5)
    module = layer_of(packed)
    module.rounded = False
    dense = unpack(packed)
    for tokens in (3, 40):  # a small batch, and tiles
        x = torch.randn(tokens, 96, requires_grad=True)
        assert torch.allclose(multiply(packed, x.detach()), x.detach() @ dense.T, rtol=1e-4, atol=1e-3)
        y = module(x)
        assert torch.allclose(y, x @ dense.T, rtol=1e-4, atol=1e-3)
        y.sum().backward()
        assert torch.allclose(x.grad, dense.sum(0).expand_as(x), rtol=1e-4, atol=1e-3)  # type: ignore[arg-type]
    again = PackedLinear(96, 24, bias=False)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.packed.exponents, packed.exponents)  # type: ignore[arg-type]
    assert torch.equal(module.to_dense().weight, dense)


def damaged(exponents: Tensor | None, value_type: str = "int4") -> PackedWeight:
    return dataclasses.replace(packed_of(4, 40, value_type, 0.5), exponents=exponents)


@settings(deadline=None, max_examples=40)
@given(st.integers(-128, 127), st.integers(0, 39))
def test_an_exponent_outside_the_limits_is_refused(exponent: int, place: int) -> None:
    exponents = exponents_of(40)
    exponents[place] = exponent
    if -8 <= exponent <= 7:
        validate(damaged(exponents), "w")
    else:
        with pytest.raises(FormatError, match=f"packed weight w: an exponent is {exponent}, not one of -8 to 7"):
            validate(damaged(exponents), "w")


def test_exponents_that_do_not_fit_are_refused() -> None:
    for exponents in (exponents_of(39), exponents_of(40).int(), exponents_of(40).view(1, -1)):
        with pytest.raises(FormatError, match="exponents is torch"):
            validate(damaged(exponents), "w")
    packed = pack(sparse_weight(4, 40, 0.5))
    assert packed is not None
    with pytest.raises(FormatError, match="exponents with values of type fp32"):
        validate(dataclasses.replace(packed, exponents=exponents_of(40)), "w")
    embedding = PackedEmbedding(torch.nn.Embedding(4, 40))
    with pytest.raises(FormatError, match="int8 with exponents; an embedding is dense"):
        embedding.set_packed(packed_of(4, 40, "int8", 0.0))


def with_exponents(llama: Path, values: str, out: Path) -> Path:
    """The packed form of a pruned model as if its run had rounded with exponents."""
    linears = []
    for file in llama.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            if "_proj" in name:
                text = text_of_exponents(exponents_of(weight.shape[1]))
                linears.append(
                    {"name": name.removesuffix(".weight"), "exponents": text, "shape": weight.shape, "zeros": 0}
                )
    record = {"values": values, "sparsity_asked": 0.5, "linears": linears}
    (llama / "pruning.json").write_text(json.dumps(record))
    try:
        return sparsellm.pack(llama, out=out, values=values).path
    finally:
        (llama / "pruning.json").unlink()


@pytest.mark.skipif(native.available() is None, reason="no compiled kernels")
@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_token_in_one_call(values: str, activations: str, llama: Path, tmp_path: Path) -> None:
    model = sparsellm.load(with_exponents(llama, values, tmp_path / "packed"), activations=activations)
    assert why_not(model) is None
    ids = torch.randint(model.config.vocab_size, (1, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat([model(ids[:, :9]).logits[0], model(ids).logits[0][9:]])
    decoder = Decoder(model, 14)
    decoder.read(ids[:, :9])
    for position in range(9, 14):
        found = decoder.step(int(ids[0, position]), position)
        # Where sums differ in their order, a rounded activation may.
        assert torch.allclose(found, expected[position], atol=1e-4 if activations == "fp32" else 1e-2)


def test_files_of_version_2_are_read(packed: Path, llama: Path, tmp_path: Path) -> None:
    """They have offsets of dense weights, and no exponents."""
    out = sparsellm.pack(llama, out=tmp_path / "packed", values="int4", head="int8").path
    config = json.loads((out / "config.json").read_text())
    entries = config["quantization_config"]["linears"]
    dense = [name for name, entry in entries.items() if entry["layout"] == "dense"]
    assert dense
    config["quantization_config"]["format_version"] = 2
    (out / "config.json").write_text(json.dumps(config))
    (out / "packed.json").unlink()
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        expected = sparsellm.load(out)(ids).logits
        for file in out.glob("*.safetensors"):
            tensors = load_file(file)
            for name in dense:
                if f"{name}.weight_mask" in tensors:
                    rows, columns = entries[name]["shape"]
                    assert f"{name}.weight_offsets" not in tensors
                    tensors[f"{name}.weight_offsets"] = torch.arange(rows + 1) * columns
            save_file(tensors, file, metadata={"format": "pt"})
        assert torch.equal(sparsellm.load(out)(ids).logits, expected)


@pytest.mark.parametrize(
    "offsets", [torch.zeros(2, 3, dtype=torch.int64), torch.tensor(5), torch.full((3,), torch.nan)], ids=str
)
def test_damaged_offsets_of_int3_are_refused(offsets: Tensor, llama: Path, tmp_path: Path) -> None:
    """Their number of values is needed before the values can be read."""
    out = sparsellm.pack(llama, out=tmp_path / "packed", values="int3").path
    (out / "packed.json").unlink()
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        tensors |= {name: offsets for name in tensors if name.endswith("_offsets")}
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StorageError, match="offsets is torch"):
        sparsellm.unpack(out, out=tmp_path / "again")
