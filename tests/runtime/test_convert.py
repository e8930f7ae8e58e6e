"""Whole checkpoints: packed, opened by transformers, and unpacked bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import tables
from sparsellm.errors import RecipeError, StorageError
from sparsellm.patterns import NM
from sparsellm.storage.destination import partial_of
from sparsellm.storage.resume import RunState, unfinished
from sparsepack.checkpoint import read_config
from sparsepack.errors import FormatError
from sparsepack.module import PackedLinear
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer
from tests.models.families import family
from tests.models.pruned import prune_tiny

FAMILIES = [tiny_llama, tiny_opt, tiny_gpt2]
IDS = torch.arange(2, 42).view(2, 20)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: Callable[..., PreTrainedModel] = request.param
    return save_tiny(prune_tiny(family()), tiny_tokenizer(), tmp_path_factory.mktemp("pruned") / "dense")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def dense(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory)  # type: ignore[no-any-return]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def test_packed_and_unpacked_again_bit_for_bit(pruned: Path, tmp_path: Path) -> None:
    result = sparsellm.pack(pruned, out=tmp_path / "packed")
    assert result.packed_bytes < 0.5 * result.dense_bytes
    assert result.checkpoint_bytes < sum(file.stat().st_size for file in pruned.glob("*.safetensors"))
    sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again")
    before, after = tensors(pruned), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
        assert value.dtype == after[name].dtype
    assert "quantization_config" not in read_config(tmp_path / "again")
    assert not (tmp_path / "again" / "packed.json").exists()
    assert torch.equal(logits(dense(tmp_path / "again")), logits(dense(pruned)))


def test_transformers_opens_it_and_so_does_load(pruned: Path, tmp_path: Path) -> None:
    sparsellm.pack(pruned, out=tmp_path / "packed")
    expected = logits(dense(pruned))
    linears = [name for name, module in dense(pruned).named_modules() if ".0." in name and hasattr(module, "weight")]
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), sparsellm.load(tmp_path / "packed")):
        assert torch.allclose(logits(model), expected, atol=1e-4)
        inside = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        assert inside
        assert all("norm" not in name and "ln" not in name for name in inside)
        assert len(inside) >= sum("proj" in n or "fc" in n or "c_" in n for n in linears)
        assert not [parameter for parameter in model.parameters() if parameter.is_meta]


@pytest.mark.parametrize("values", ["bf16", "fp16", "fp32", "int8", "int4"])
def test_other_value_types(values: str, pruned: Path, tmp_path: Path) -> None:
    result = sparsellm.pack(pruned, out=tmp_path / "packed", values=values)
    assert {entry.value_type for entry in result.linears.values() if entry} == {values}
    model = sparsellm.load(tmp_path / "packed")
    unpacked = dense(sparsellm.unpack(tmp_path / "packed", out=tmp_path / "dense").path)
    assert torch.allclose(logits(model), logits(unpacked), atol=1e-4)
    for name, value in tensors(pruned).items():
        found = tensors(tmp_path / "dense")[name]
        assert found.dtype == value.dtype
        assert torch.equal(found == 0, value == 0) or values == "int4", name
        bound = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 0.0, "int8": 1 / 127, "int4": 0.3}[values]
        assert (found - value).abs().max() <= bound * value.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_asked_for_concerns_what_is_not_packed(dtype: str, packed: Path) -> None:
    model = sparsellm.load(packed, dtype=dtype)
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert module.weight_values.dtype == torch.float32
    assert module.weight.dtype == model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    assert logits(model).dtype == getattr(torch, dtype)


def test_a_loaded_model_generates_saves_and_becomes_dense(packed: Path, llama: Path, tmp_path: Path) -> None:
    model = sparsellm.load(packed)
    written = model.generate(IDS[:1], max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert torch.equal(written, dense(llama).generate(IDS[:1], max_new_tokens=12, do_sample=False))  # type: ignore[operator]
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(sparsellm.load(tmp_path / "saved")), logits(model))
    before = logits(model)
    model.dequantize()  # type: ignore[operator]
    assert not [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert torch.allclose(logits(model), before, atol=1e-4)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in read_config(tmp_path / "plain")


def test_n_m_is_stored_in_its_shorter_code(tmp_path: Path) -> None:
    source = save_tiny(prune_tiny(tiny_llama(), NM(2, 4)), tiny_tokenizer(), tmp_path / "dense")
    result = sparsellm.pack(source, out=tmp_path / "packed")
    assert {(entry.layout, entry.pattern) for entry in result.linears.values() if entry} == {("nm", (2, 4))}
    # 80 columns: 20 codes of 3 bits are 8 bytes
    assert tensors(tmp_path / "packed")["model.layers.0.mlp.down_proj.weight_mask"].shape == (32, 8)
    model = sparsellm.load(tmp_path / "packed")
    assert torch.allclose(logits(model), logits(dense(source)), atol=1e-4)
    model.save_pretrained(tmp_path / "saved")  # in memory the codes are bits, and so they are saved
    assert torch.equal(logits(sparsellm.load(tmp_path / "saved")), logits(model))
    for name, value in tensors(sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again").path).items():
        assert torch.equal(value, tensors(source)[name])


def test_what_is_smaller_dense_stays_dense(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, ::2] = 0
    result = sparsellm.pack(save_tiny(model, tiny_tokenizer(), tmp_path / "a"), out=tmp_path / "p")
    assert [name for name, entry in result.linears.items() if entry] == ["model.layers.1.mlp.up_proj"]
    loaded = sparsellm.load(tmp_path / "p")
    assert isinstance(loaded.get_submodule("model.layers.1.mlp.down_proj"), nn.Linear)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    nothing = sparsellm.pack(save_tiny(tiny_llama(), None, tmp_path / "b"), out=tmp_path / "q")
    assert not any(nothing.linears.values())
    assert torch.equal(logits(dense(tmp_path / "q")), logits(tiny_llama()))


def test_eval_inspect_and_prune_read_it_as_if_dense(packed: Path, llama: Path, tmp_path: Path) -> None:
    assert sparsellm.inspect(packed) == sparsellm.inspect(llama)
    assert sparsellm.evaluate(packed, IDS).value == sparsellm.evaluate(llama, IDS).value
    recipe = sparsellm.Recipe(method="magnitude", sparsity=0.9)
    result = sparsellm.prune(packed, recipe, out=tmp_path / "more", calibration=IDS)
    assert result.sparsity == pytest.approx(0.9, abs=0.01)
    assert "quantization_config" not in read_config(tmp_path / "more")
    assert dense(tmp_path / "more").generate(IDS[:1], max_new_tokens=2).shape == (1, 22)  # type: ignore[operator]
    with pytest.raises(RecipeError, match="out"):
        sparsellm.prune(packed, recipe, calibration=IDS)


def test_mistakes_are_named(llama: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="packed already"):
        sparsellm.pack(packed, out=tmp_path / "p")
    with pytest.raises(RecipeError, match="not packed"):
        sparsellm.unpack(llama, out=tmp_path / "p")
    with pytest.raises(RecipeError, match="int2"):
        sparsellm.pack(llama, out=tmp_path / "p", values="int2")
    with pytest.raises(StorageError, match="itself"):
        sparsellm.pack(llama, out=llama, overwrite=True)
    with pytest.raises(StorageError, match="--overwrite"):
        sparsellm.unpack(packed, out=llama)
    with pytest.raises(FormatError, match="not a directory"):
        sparsellm.load(tmp_path / "nowhere")
    assert not (tmp_path / "p").exists()


def test_an_interrupted_pack_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsellm import convert

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        sparsellm.pack(llama, out=tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_reports_of_the_pruning_are_copied_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "dense"))
    (source / "pruning.json").write_bytes(b'{"note": "\xff"}\r\n')
    packed = sparsellm.pack(source, out=tmp_path / "p").path
    again = sparsellm.unpack(packed, out=tmp_path / "again").path
    for directory in (packed, again):
        assert (directory / "pruning.json").read_bytes() == (source / "pruning.json").read_bytes()


def test_an_unfinished_prune_stays_without_restart(llama: Path, packed: Path, tmp_path: Path) -> None:
    RunState(partial_of(tmp_path / "p"), {"a": 1}).close()
    for run, model in ((sparsellm.pack, llama), (sparsellm.unpack, packed)):
        with pytest.raises(StorageError, match="unfinished prune"):
            run(model, out=tmp_path / "p")
        assert unfinished(partial_of(tmp_path / "p"))
    assert sparsellm.pack(llama, out=tmp_path / "p", restart=True).path == tmp_path / "p"
    assert not partial_of(tmp_path / "p").exists()


def test_the_model_is_known_by_any_name(llama: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(llama)
    for run, model in ((sparsellm.pack, llama), (sparsellm.unpack, packed)):
        for out in (tmp_path / "link", llama.parent, model / "a", model.parent / "x" / ".." / model.name, ""):
            if (run, out) != (sparsellm.unpack, tmp_path / "link"):
                with pytest.raises(StorageError):
                    run(model, out=out, overwrite=True, restart=True)
    assert tensors(llama)
    assert tensors(packed)


def test_experts_that_stay_dense_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny(family("Mixtral"), None, tmp_path / "a")
    result = sparsellm.pack(source, out=tmp_path / "p")
    assert result.expert_weights == sum(m.weights for m in sparsellm.inspect(source) if ".experts." in m.name) > 0
    tables.print_packed(result)
    assert "weights of experts stay dense" in capsys.readouterr().err
