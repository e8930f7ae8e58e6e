"""What vLLM calls, on layers of a stand-in: loading in any order, joining, shares of ranks, embeddings, refusals."""

from __future__ import annotations

import pickle
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsepack_vllm
import stand_in
from by_hand import sparse_weight, two_of_four
from sparsepack.checkpoint import PackedEntry, manifest, quantization_config
from sparsepack.errors import FormatError
from sparsepack.layout import PackedWeight, pack, unpack
from sparsepack_vllm.quantization import (
    PackedConfig,
    PackedLinearMethod,
    TiedHeadMethod,
)
from stand_in import LinearBase, ParallelLMHead, VocabParallelEmbedding

COLUMNS = 128
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
SIZES = {"q": 16, "k": 8, "v": 8}


def packed_weight(
    rows: int, values: str = "int8", layout: str = "bitmask", seed: int = 0
) -> PackedWeight:
    weight = sparse_weight(rows, COLUMNS, 0.5, seed=seed)
    if layout == "nm":
        weight = two_of_four(weight)
    packed = pack(weight, values, layout, group=64)
    assert packed is not None
    return packed


def dense(packed: PackedWeight) -> Tensor:
    return unpack(packed, torch.float32)


def config_of(weights: dict[str, PackedWeight]) -> PackedConfig:
    entries = {
        name: PackedEntry.of(packed, torch.float32) for name, packed in weights.items()
    }
    config = PackedConfig.from_config(quantization_config(entries))
    config.packed_modules_mapping = FUSED
    return config


def load(layer: nn.Module, packed: PackedWeight, part: Any = None) -> None:
    """Calls the loaders as vLLM does; a mask may come before or after its values."""
    tensors = {"weight": torch.zeros(1)}
    for field, tensor in packed.stored.items():
        tensors[f"weight_{field}"] = tensor
    for name, tensor in sorted(tensors.items(), reverse=True):
        parameter: Any = getattr(layer, name)
        if part is None:
            parameter.weight_loader(parameter, tensor)
        else:
            parameter.weight_loader(parameter, tensor, part)


def built(
    config: PackedConfig,
    layer: nn.Module,
    prefix: str,
    rows: list[int],
    *,
    ranks: int = 1,
    columns: int = COLUMNS,
    out: int | None = None,
) -> PackedLinearMethod:
    method = config.get_quant_method(layer, prefix)
    assert isinstance(method, PackedLinearMethod)
    method.create_weights(
        layer, columns, rows, COLUMNS, out or sum(rows) * ranks, torch.float32
    )
    return method


@pytest.mark.parametrize("values", ["bf16", "int8", "int6", "int4", "int3"])
@pytest.mark.parametrize("layout", ["bitmask", "nm", "dense"])
def test_parts_in_any_order_become_one_weight(values: str, layout: str) -> None:
    parts = {
        part: packed_weight(rows, values, layout, seed)
        for seed, (part, rows) in enumerate(SIZES.items())
    }
    config = config_of({f"a.{part}_proj": packed for part, packed in parts.items()})
    layer = LinearBase()
    method = built(config, layer, "a.qkv_proj", list(SIZES.values()))
    for part in ("v", "q", "k"):
        load(layer, parts[part], part)
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)  # vLLM may ask twice
    assert len(layer.parts) == 1  # type: ignore[arg-type]
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    weight = torch.cat([dense(packed) for packed in parts.values()])
    x = torch.randn(20, COLUMNS)
    bias = torch.randn(32)
    assert torch.allclose(
        method.apply(layer, x, bias), x @ weight.t() + bias, atol=1e-4
    )


def test_parts_of_other_types_stay_apart() -> None:
    gate = packed_weight(8, "int8")
    up = packed_weight(8, "int4", seed=1)
    config = config_of({"m.gate_proj": gate, "m.up_proj": up})
    layer = LinearBase()
    method = built(config, layer, "m.gate_up_proj", [8, 8])
    load(layer, up, 1)
    load(layer, gate, 0)
    method.process_weights_after_loading(layer)
    assert len(layer.parts) == 2  # type: ignore[arg-type]
    x = torch.randn(2, 10, COLUMNS)
    weight = torch.cat((dense(gate), dense(up)))
    assert torch.allclose(method.apply(layer, x), x @ weight.t(), atol=1e-4)


@pytest.mark.parametrize("repeats", [1, 2])
def test_ranks_share_the_rows_of_heads(repeats: int) -> None:
    """With one head of k and v and two ranks, both hold it."""
    ranks = 2
    parts = {
        part: packed_weight(rows, "int4", seed=seed)
        for seed, (part, rows) in enumerate(SIZES.items())
    }
    config = config_of({f"a.{part}_proj": packed for part, packed in parts.items()})
    held = 8 // ranks * repeats
    for rank in range(ranks):
        layer = LinearBase(rank, repeats)
        method = built(config, layer, "a.qkv_proj", [8, held, held], ranks=ranks)
        for part, packed in parts.items():
            load(layer, packed, part)
        method.process_weights_after_loading(layer)
        begin = 0 if repeats == 2 else rank * held
        weight = torch.cat(
            (
                dense(parts["q"])[rank * 8 : rank * 8 + 8],
                dense(parts["k"])[begin : begin + held],
                dense(parts["v"])[begin : begin + held],
            )
        )
        assert torch.equal(dense(layer.parts[0].packed), weight)  # type: ignore[index]


def test_ranks_share_a_linear_that_the_checkpoint_has_fused() -> None:
    """Phi-3 has one linear for gate and up; a rank holds rows of both."""
    packed = packed_weight(16, "int8")
    config = config_of({"m.gate_up_proj": packed})
    for rank in range(2):
        layer = LinearBase(rank)
        method = built(config, layer, "m.gate_up_proj", [4, 4], ranks=2)
        load(layer, packed)
        method.process_weights_after_loading(layer)
        rows = [*range(rank * 4, rank * 4 + 4), *range(8 + rank * 4, 12 + rank * 4)]
        assert torch.equal(dense(layer.parts[0].packed), dense(packed)[rows])  # type: ignore[index]


@pytest.mark.parametrize("values", ["bf16", "int8", "int5", "int4", "int3"])
def test_the_columns_of_ranks_add_up_to_the_product(values: str) -> None:
    packed = packed_weight(16, values)
    config = config_of({"m.down_proj": packed})
    x = torch.randn(20, COLUMNS)
    total = torch.zeros(20, 16)
    for rank in range(2):
        layer = LinearBase(rank)
        method = built(config, layer, "m.down_proj", [16], columns=64)
        load(layer, packed)
        method.process_weights_after_loading(layer)
        total += method.apply(layer, x[:, 64 * rank : 64 * rank + 64].contiguous())
    assert torch.allclose(total, x @ dense(packed).t(), atol=1e-4)


def test_ranks_that_do_not_divide_are_refused_by_name() -> None:
    packed = packed_weight(16)
    config = config_of({"layers.3.down_proj": packed})
    layer = LinearBase()
    method = built(config, layer, "layers.3.down_proj", [16], columns=32)
    load(layer, packed)
    with pytest.raises(FormatError, match=r"layers\.3\.down_proj .* 4 ranks cannot"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize(("begin", "end"), [(0, 100), (0, 64), (64, 100)])
def test_an_embedding_without_a_name_is_found_by_shape(begin: int, end: int) -> None:
    packed = packed_weight(100, "int8", "dense")
    config = config_of({"model.embed_tokens": packed, "a.o_proj": packed_weight(16)})
    layer = VocabParallelEmbedding(100, COLUMNS, begin, end)
    method: Any = config.get_quant_method(layer, "")
    held = 128 if end - begin == 100 else 64  # vLLM pads
    method.create_weights(layer, COLUMNS, [held], COLUMNS, 128, torch.bfloat16)
    load(layer, packed)
    method.process_weights_after_loading(layer)
    rows = dense(packed)[begin:end]
    ids = torch.tensor([[0, 3], [35, 7]])
    got = method.embedding(layer, ids)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rows[ids].bfloat16())
    x = torch.randn(20, COLUMNS)
    logits = method.apply(layer, x)
    assert logits.shape == (20, held)
    assert torch.allclose(logits[:, : end - begin], x @ rows.t(), atol=1e-4)
    assert not logits[:, end - begin :].any()


def test_a_tied_head_is_the_embedding() -> None:
    config = config_of({"model.embed_tokens": packed_weight(100, "int8", "dense")})
    head = ParallelLMHead(100, COLUMNS)
    assert config.get_quant_method(head, "lm_head") is None  # a dense one of its own
    config.tied = True
    method: Any = config.get_quant_method(head, "lm_head")
    assert isinstance(method, TiedHeadMethod)
    embedding = VocabParallelEmbedding(100, COLUMNS)
    assert method.tie_weights(head, embedding) is embedding
    with pytest.raises(FormatError, match="output head has no weight"):
        method.apply(head, torch.zeros(1, COLUMNS))


def test_all_else_is_left_to_vllm() -> None:
    config = config_of({"a.o_proj": packed_weight(16)})
    dense_linear = config.get_quant_method(LinearBase(), "a.gate")
    assert isinstance(dense_linear, stand_in.UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Module(), "mlp.experts") is None
    assert config.get_quant_method(VocabParallelEmbedding(100, COLUMNS), "") is None


def test_a_packed_linear_that_no_layer_takes_is_refused_by_name() -> None:
    """Some models of vLLM make their embedding without a quantisation."""
    embedding = packed_weight(100, "int8", "dense")
    config = config_of({"a.o_proj": packed_weight(16), "model.embed_tokens": embedding})
    config.get_quant_method(LinearBase(), "a.o_proj")
    with pytest.raises(FormatError, match=r"^model\.embed_tokens is packed, and the"):
        config.get_checkpoint_weight_mapper()
    config.get_quant_method(VocabParallelEmbedding(100, COLUMNS), "")
    assert config.get_checkpoint_weight_mapper() == "renames nothing"


def test_a_newer_format_is_refused_in_one_line() -> None:
    content = quantization_config({}) | {"format_version": 99}
    with pytest.raises(
        FormatError, match="format version 99 and this sparsepack reads"
    ):
        PackedConfig.from_config(content)


def test_dense_and_packed_parts_of_a_layer_are_refused_by_name() -> None:
    config = config_of({"l.0.q_proj": packed_weight(8), "l.0.v_proj": packed_weight(8)})
    with pytest.raises(
        FormatError, match=r"^l\.0\.k_proj is dense and l\.0\.q_proj is"
    ):
        config.get_quant_method(LinearBase(), "l.0.qkv_proj")


def test_damage_and_other_shapes_are_refused_by_name() -> None:
    packed = packed_weight(16)
    config = config_of({"a.o_proj": packed})

    def loaded(rows: int, change: Any) -> None:
        layer = LinearBase()
        method = built(config, layer, "a.o_proj", [rows])
        load(layer, packed)
        change(layer)
        method.process_weights_after_loading(layer)

    def refusal(rows: int, change: Any) -> str:
        with pytest.raises(FormatError, match=r"a\.o_proj") as refused:
            loaded(rows, change)
        return str(refused.value)

    def damage(layer: Any) -> None:
        mask = packed.mask.clone()
        mask[0, 0] ^= 1
        layer.weight_mask.weight_loader(layer.weight_mask, mask)

    def dense_weight(layer: Any) -> None:
        layer.weight.weight_loader(layer.weight, torch.zeros(16, COLUMNS))

    def unknown(layer: Any) -> None:
        layer.weight.weight_loader(layer.weight, torch.zeros(1), (0, 1))

    assert "row 0 has" in refusal(16, damage)
    assert "where the model has (8, 128)" in refusal(8, lambda layer: None)
    assert "says that it is packed" in refusal(16, dense_weight)
    assert "vLLM loads part (0, 1)" in refusal(16, unknown)
    layer = LinearBase()
    method = built(config, layer, "a.o_proj", [16])
    with pytest.raises(FormatError, match=r"a\.o_proj has no mask"):
        method.process_weights_after_loading(layer)


def test_the_files_of_a_directory_are_compared_with_their_checksums(
    tmp_path: Path,
) -> None:
    import json

    from safetensors.torch import save_file

    content = quantization_config({})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": content}))
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "packed.json").write_text(json.dumps(manifest(tmp_path)))
    config = PackedConfig.from_config(content)
    config.maybe_update_config(str(tmp_path))
    config.maybe_update_config("organisation/model")  # files of a hub have no directory
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="has changed"):
        config.maybe_update_config(str(tmp_path))


def test_names_follow_the_models_own() -> None:
    class Mapper:
        def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
            return {f"language_model.{name}": entry for name, entry in values.items()}

    config = config_of({"a.o_proj": packed_weight(16)})
    config.apply_vllm_mapper(Mapper())
    method = config.get_quant_method(LinearBase(), "language_model.a.o_proj")
    assert isinstance(method, PackedLinearMethod)


def test_vllm_registers_it_once_and_can_pickle_it() -> None:
    sparsepack_vllm.register()
    sparsepack_vllm.register()
    assert {"sparsellm": PackedConfig} == stand_in.REGISTERED
    config = config_of({"a.o_proj": packed_weight(16)})
    assert pickle.loads(pickle.dumps(config)).entries == config.entries
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"sparsepack": "sparsepack_vllm:register"}
