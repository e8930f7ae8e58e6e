"""Whole checkpoints: packed, opened by transformers, and unpacked bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from by_hand import two_of_four
from sparsellm import convert
from sparsellm.app import tables
from sparsellm.errors import RecipeError
from sparsellm.files.contents import write_list
from sparsepack.bench import resident_bytes
from sparsepack.errors import FormatError
from sparsepack.files import read_object
from sparsepack.module import PackedLinear
from tests.files.small import tensors_of
from tests.method.sweep.helpers import same_bits
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt
from tests.models.families import family
from tests.models.pruned import prune_tiny

IDS = torch.arange(2, 42).view(2, 20)


@pytest.fixture(
    scope="module",
    params=[tiny_llama, tiny_opt, tiny_gpt2],
    ids=lambda family: family.__name__,
)
def pruned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return save_tiny(
        prune_tiny(request.param()), None, tmp_path_factory.mktemp("pruned") / "dense"
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def dense(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory)  # type: ignore[no-any-return]


def test_packed_loaded_and_unpacked_bit_for_bit(pruned: Path, tmp_path: Path) -> None:
    result = sparsellm.pack(pruned, out=tmp_path / "packed")
    assert str(tmp_path / "packed") in repr(result)
    assert len(repr(result)) < 400 + len(str(tmp_path))
    assert result.packed_bytes < 0.5 * result.dense_bytes
    assert result.checkpoint_bytes < sum(
        file.stat().st_size for file in pruned.glob("*.safetensors")
    )
    expected = logits(dense(pruned))
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
        sparsellm.load(tmp_path / "packed"),
    ):
        assert torch.allclose(logits(model), expected, atol=1e-4)
        inside = [
            module for module in model.modules() if isinstance(module, PackedLinear)
        ]
        assert (
            len(inside)
            == sum(entry is not None for entry in result.linears.values())
            > 0
        )
        assert not [parameter for parameter in model.parameters() if parameter.is_meta]
    again = sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again").path
    before, after = tensors_of(pruned), tensors_of(again)
    assert {name: value.dtype for name, value in before.items()} == {
        n: v.dtype for n, v in after.items()
    }
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert "quantization_config" not in read_object(again / "config.json")
    assert not (again / "packed.json").exists()
    written, plain = (
        one.generate(IDS[:1], max_new_tokens=12, do_sample=False)
        for one in (model, dense(pruned))
    )
    assert torch.equal(written, plain)
    wide = sparsellm.load(tmp_path / "packed")
    wide.dequantize(torch.float64)  # type: ignore[operator]
    assert {weight.dtype for weight in wide.parameters()} == {torch.float64}
    assert not [module for module in wide.modules() if isinstance(module, PackedLinear)]
    assert torch.allclose(logits(wide).float(), expected, atol=1e-4)
    model.dequantize()
    assert (
        0
        < resident_bytes(model, linears_only=True)
        == resident_bytes(dense(pruned), linears_only=True)
    )
    model.save_pretrained(tmp_path / "plain")
    assert torch.allclose(logits(dense(tmp_path / "plain")), expected, atol=1e-6)


@pytest.mark.parametrize("values", ["bf16", "fp16", "fp32", "int8", "int6", "int4"])
def test_other_value_types(values: str, llama: Path, tmp_path: Path) -> None:
    result = sparsellm.pack(llama, out=tmp_path / "packed", values=values, head="keep")
    assert {entry.value_type for entry in result.linears.values() if entry} == {values}
    unpacked = sparsellm.unpack(tmp_path / "packed", out=tmp_path / "dense").path
    assert torch.allclose(
        logits(sparsellm.load(tmp_path / "packed")), logits(dense(unpacked)), atol=1e-4
    )
    back = tensors_of(unpacked)
    for name, value in tensors_of(llama).items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name] == 0, value == 0) or values in ("int6", "int4"), (
            name
        )
        bound = {
            "bf16": 2.0**-8,
            "fp16": 2.0**-11,
            "fp32": 0.0,
            "int8": 1 / 127,
            "int6": 0.1,
            "int4": 0.3,
        }[values]
        assert (back[name] - value).abs().max() <= bound * value.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_is_that_of_activations_and_dense_weights(
    dtype: str, packed: Path
) -> None:
    model = sparsellm.load(packed, dtype=dtype)
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert module.weight_values.dtype == torch.float32
    assert (
        module.weight.dtype
        == model.get_input_embeddings().weight.dtype
        == getattr(torch, dtype)
    )
    assert logits(model).dtype == getattr(torch, dtype)


def test_n_m_is_stored_in_its_shorter_code(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "layers" in name:
                module.weight.copy_(two_of_four(module.weight))
    source = save_tiny(model, None, tmp_path / "dense")
    result = sparsellm.pack(source, out=tmp_path / "packed")
    assert {
        (entry.layout, entry.pattern) for entry in result.linears.values() if entry
    } == {("nm", (2, 4))}
    # 80 columns: 20 codes of 3 bits are 8 bytes
    assert tensors_of(tmp_path / "packed")[
        "model.layers.0.mlp.down_proj.weight_mask"
    ].shape == (32, 8)
    loaded = sparsellm.load(tmp_path / "packed")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    # in memory the codes are bits, and so they are saved
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(sparsellm.load(tmp_path / "saved")), logits(loaded))
    assert same_bits(
        tensors_of(sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again").path),
        tensors_of(source),
    )


def test_weights_that_are_smaller_dense_stay_dense(
    tmp_path: Path, run: Any, refusal: Any
) -> None:
    model = tiny_llama()
    source = save_tiny(model, None, tmp_path / "b")
    assert "b has nothing to pack" in refusal(
        "pack", source, "--out", tmp_path / "q"
    ), "nothing is smaller packed"
    assert not list(tmp_path.glob("q*"))
    assert run("pack", source, "--out", tmp_path / "q", "--values", "int8")[0] == 0
    model.model.layers[1].mlp.up_proj.weight.data[:, ::2] = 0
    result = sparsellm.pack(save_tiny(model, None, tmp_path / "a"), out=tmp_path / "p")
    assert [name for name, entry in result.linears.items() if entry] == [
        "model.layers.1.mlp.up_proj"
    ]
    assert torch.allclose(
        logits(sparsellm.load(tmp_path / "p")), logits(model), atol=1e-4
    )


def test_eval_inspect_and_prune_read_it_as_if_dense(
    packed: Path, llama: Path, tmp_path: Path
) -> None:
    assert sparsellm.inspect(packed) == sparsellm.inspect(llama)
    assert sparsellm.evaluate(packed, IDS).value == sparsellm.evaluate(llama, IDS).value
    recipe = sparsellm.Recipe(method="magnitude", sparsity=0.9)
    result = sparsellm.prune(packed, recipe, out=tmp_path / "more", calibration=IDS)
    assert result.sparsity == pytest.approx(0.9, abs=0.01)
    assert "quantization_config" not in read_object(tmp_path / "more" / "config.json")
    with pytest.raises(RecipeError, match="out"):
        sparsellm.prune(packed, recipe, calibration=IDS)


def test_mistakes_are_named(llama: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="packed already"):
        sparsellm.pack(packed, out=tmp_path / "p")
    with pytest.raises(RecipeError, match="not packed"):
        sparsellm.unpack(llama, out=tmp_path / "p")
    for setting in ({"values": "int2"}, {"head": "int7"}):
        with pytest.raises(RecipeError, match="it should be 'keep'"):
            sparsellm.pack(llama, out=tmp_path / "p", **setting)
    with pytest.raises(FormatError, match="not a directory"):
        sparsellm.load(tmp_path / "nowhere")
    assert not (tmp_path / "p").exists()


def test_an_interrupted_pack_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "manifest", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sparsellm.pack(llama, out=tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_reports_of_the_pruning_are_copied_byte_for_byte(
    llama: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "dense"))
    (source / "pruning.json").write_bytes(b'{"note": "\xff"}\r\n')
    write_list(source, {})
    packed = sparsellm.pack(source, out=tmp_path / "p", values="keep").path
    for directory in (packed, sparsellm.unpack(packed, out=tmp_path / "again").path):
        assert (directory / "pruning.json").read_bytes() == (
            source / "pruning.json"
        ).read_bytes()


def test_experts_that_stay_dense_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(prune_tiny(family("Mixtral")), None, tmp_path / "a")
    result = sparsellm.pack(source, out=tmp_path / "p")
    assert (
        result.expert_weights
        == sum(m.weights for m in sparsellm.inspect(source) if ".experts." in m.name)
        > 0
    )
    tables.print_packed(result)
    assert "weights of experts stay dense" in capsys.readouterr().err
