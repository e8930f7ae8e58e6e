"""No weight that is written is NaN or infinite, in any dtype, from the walk or from the sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.utils.prune import l1_unstructured

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, NumericalError
from sparsellm.files.directory import partial_of
from sparsellm.model import open_chain
from tests.files.small import tensors_of
from tests.method.sweep.helpers import CPU
from tests.models import save_tiny, tiny_llama

DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
IDS = torch.arange(96).view(4, 24)


@pytest.mark.parametrize("name", [DOWN, QUERY])
@pytest.mark.parametrize("method", ["sparsegpt", "admm", "sparsellm"])
def test_weights_beyond_fp16_stop_the_run_and_name_the_linear(
    method: str, name: str, tmp_path: Path
) -> None:
    """What is left makes up for what was pruned, and so grows beyond 65504."""
    model = tiny_llama().half()
    model.get_submodule(name).weight.data.fill_(60_000.0)
    source = save_tiny(model, None, tmp_path / "model")
    recipe = Recipe(method=method, sparsity=0.6)
    with pytest.raises(NumericalError) as caught:
        sparsellm.prune(source, recipe, out=tmp_path / "p", calibration=IDS)
    said = str(caught.value)
    assert f"weight {name}.weight would get " in said
    assert (
        "float16, whose largest number is 65504; store the model in bfloat16 or float32"
        in said
    )
    written = tensors_of(partial_of(tmp_path / "p") / "blocks")
    # the block before is kept
    assert any(key.startswith("model.layers.0.") for key in written)
    assert all(bool(value.isfinite().all()) for value in written.values())
    assert not any(key.startswith("model.layers.1.") for key in written)
    assert (
        sparsellm.prune(
            source, recipe.updated(exclude=[name]), out=tmp_path / "q", calibration=IDS
        ).sparsity
        > 0.5
    )


@pytest.mark.parametrize("part", ["config", "generation_config"])
def test_what_transformers_does_not_save_is_refused_before_the_work(
    part: str, tmp_path: Path
) -> None:
    model = tiny_llama()
    getattr(model, part).temperature = 0.6  # where do_sample is not set
    with pytest.raises(
        ModelError, match=r"transformers does not save the model's .*Config"
    ):
        sparsellm.prune(
            model, Recipe(method="wanda"), out=tmp_path / "p", calibration=IDS
        )
    assert not [*tmp_path.iterdir()]


def test_a_model_that_was_given_as_an_object_is_named_in_its_config(
    tmp_path: Path,
) -> None:
    model = tiny_llama().bfloat16()
    model.config.architectures = None
    before = torch.get_rng_state()
    sparsellm.prune(model, Recipe(method="wanda"), out=tmp_path / "p", calibration=IDS)
    assert torch.equal(torch.get_rng_state(), before)
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (
        ["LlamaForCausalLM"],
        "bfloat16",
    )
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="has adapters; merge them first"):
        sparsellm.prune(model, Recipe(method="wanda"), calibration=IDS)
    model = tiny_llama()
    model.model.layers[1].to("meta")
    for given in (model, model.to("meta")):
        with pytest.raises(
            ModelError,
            match="on several devices, or not in memory; load it without device_map",
        ):
            sparsellm.prune(given, Recipe(method="wanda"), calibration=IDS)
    model = tiny_llama()
    l1_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.5)
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.up_proj has a quantised, masked"
    ):
        sparsellm.evaluate(model, IDS)
    sparsellm.pack(tmp_path / "p", out=tmp_path / "packed")
    with pytest.raises(ModelError, match="the model is packed or quantised"):
        sparsellm.prune(
            sparsellm.load(tmp_path / "packed"), Recipe(method="wanda"), calibration=IDS
        )


@pytest.mark.parametrize(
    ("held", "asked"),
    [("float32", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float32")],
)
def test_kept_weights_rounded_to_the_computing_dtype_are_told(
    held: str, asked: str, tmp_path: Path
) -> None:
    source = save_tiny(tiny_llama().to(getattr(torch, held)), None, tmp_path / "model")
    said = sparsellm.prune(
        source, Recipe(method="wanda", dtype=asked), out=tmp_path / "p", calibration=IDS
    ).warnings
    told = any(
        f"kept weights are rounded to {asked}, and stored in {held}" in warning
        for warning in said
    )
    assert told == (asked == "bfloat16")


TOO_LARGE = [
    (torch.float16, torch.float32, 65_520.0, "bfloat16 or float32"),
    (torch.float16, torch.bfloat16, -70_000.0, "bfloat16 or float32"),
    (torch.bfloat16, torch.float32, 3.4e38, "float32"),
    (torch.float32, torch.float64, 1e300, "damping"),
]


@pytest.mark.parametrize(("stored", "computed", "value", "cure"), TOO_LARGE)
@pytest.mark.parametrize(
    "name", [f"{DOWN}.weight", "model.layers.1.input_layernorm.weight"]
)
def test_a_block_is_settled_only_if_all_of_it_can_be_written(
    stored: torch.dtype,
    computed: torch.dtype,
    value: float,
    cure: str,
    name: str,
    tmp_path: Path,
) -> None:
    chain = open_chain(
        save_tiny(tiny_llama().to(stored), None, tmp_path), device=CPU, dtype=computed
    )
    dtype = str(stored).removeprefix("torch.")
    with chain.block(1):
        chain.settle_block(1)
        chain.block_parameters(1)[name].data.view(-1)[3:5] = value
        with pytest.raises(
            NumericalError,
            match=rf"{name} would get 2 infinite .* rounded to {dtype}, .*{cure}",
        ):
            chain.settle_block(1)
