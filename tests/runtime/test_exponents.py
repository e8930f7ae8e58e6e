"""Exponents of columns: every kernel, the decoder and the module against the same weight without them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsellm
from sparsepack import native
from sparsepack.codes import text_of_exponents
from sparsepack.decode import Decoder, decodes
from sparsepack.layout import unpack
from tests.packed.by_hand import exponents_of, packed_of, sparse_weight


@pytest.mark.parametrize("kernel", native.instruction_sets())
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "columns", "sparsity"), [(5, 40, 0.5), (9, 130, 0.0), (16, 320, 0.8)])
def test_kernels_multiply_activations_first(kernel: str, values: str, rows: int, columns: int, sparsity: float) -> None:
    packed = packed_of(sparse_weight(rows, columns, sparsity), values, "auto", exponents_of(columns))
    plain = dataclasses.replace(packed, exponents=None)
    x = torch.randn(3, columns)
    for dtype, roundings in ((torch.float32, (False, True)), (torch.bfloat16, (True,))):
        scaled = x.to(dtype).float() * 2.0 ** exponents_of(columns)
        for rounded in roundings:
            product = native.multiply(packed, x.to(dtype), rounded=rounded, kernel=kernel)
            assert torch.equal(product, native.multiply(plain, scaled, rounded=rounded, kernel=kernel).to(dtype))
        dense = torch.empty(rows, columns, dtype=dtype)
        native.unpack_rows(packed, 0, rows, dense, kernel=kernel)
        assert torch.equal(dense, unpack(packed).to(dtype))


@pytest.mark.skipif(native.available() is None, reason="no compiled kernels")
@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_exponents_of_a_run_are_packed_and_decoded(values: str, activations: str, llama: Path, tmp_path: Path) -> None:
    dense, linears = Path(shutil.copytree(llama, tmp_path / "dense")), []
    for name, weight in load_file(dense / "model.safetensors").items():
        if "_proj" in name:
            text = text_of_exponents(exponents_of(weight.shape[1]))
            module = name.removesuffix(".weight")
            linears.append({"name": module, "exponents": text, "shape": weight.shape, "zeros": 0})
    record = {"values": values, "sparsity_asked": 0.5, "linears": linears}
    (dense / "pruning.json").write_text(json.dumps(record))
    directory = sparsellm.pack(dense, out=tmp_path / "packed", values=values).path
    model = sparsellm.load(directory, activations=activations)
    packed = model.get_submodule("model.layers.0.mlp.down_proj").packed
    assert torch.equal(packed.exponents, exponents_of(packed.shape[1]))
    assert decodes(model)
    ids = torch.randint(model.config.vocab_size, (1, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat([model(ids[:, :9]).logits[0], model(ids).logits[0][9:]])
    decoder = Decoder(model, 14)
    decoder.read(ids[:, :9])
    for position in range(9, 14):
        logits = decoder.step(int(ids[0, position]), position)
        # Where sums differ in their order, a rounded activation may.
        assert torch.allclose(logits, expected[position], atol=1e-4 if activations == "fp32" else 1e-2)
