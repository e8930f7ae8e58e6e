"""Training keeps every zero, and what an adapter computes is what its merge computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import sparsellm
from sparsellm.errors import ModelError, RecipeError
from sparsellm.tuning.full import KeepZeros, ZeroKeeper
from tests.method.sweep.helpers import ids_of, sharing_llama
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt
from tests.models.families import family, mixtral
from tests.models.pruned import prune_tiny

IDS = ids_of(8, 16)
DATA = [{"input_ids": row, "labels": row} for row in IDS]


@pytest.fixture(
    params=[tiny_llama, tiny_opt, tiny_gpt2], ids=lambda family: family.__name__
)
def pruned(request: pytest.FixtureRequest) -> PreTrainedModel:
    return prune_tiny(request.param())


def sparse_weights(model: Any) -> dict[str, torch.Tensor]:
    matrices = {
        name: value.detach()
        for name, value in model.named_parameters()
        if value.ndim == 2
    }
    return {
        name: value.clone()
        for name, value in matrices.items()
        if (value == 0).float().mean() > 0.5
    }


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


@torch.no_grad()
def loss(model: Any) -> float:
    return float(model.eval()(input_ids=IDS, labels=IDS).loss)


def trained(model: Any, out: Path, *callbacks: Any, **settings: Any) -> Any:
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-2, weight_decay=0.1,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, **settings,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=DATA, callbacks=list(callbacks)).train()
    return model


def assert_zeros_kept(before: dict[str, torch.Tensor], model: Any) -> None:
    assert len(before) >= 8
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name) == 0, weight == 0), name


def test_the_trainer_keeps_zeros_with_the_callback_and_not_without(
    pruned: PreTrainedModel, tmp_path: Path
) -> None:
    before, start = sparse_weights(pruned), loss(pruned)
    lost = trained(copy.deepcopy(pruned), tmp_path)
    assert any(
        (dict(lost.named_parameters())[name][weight == 0] != 0).any()
        for name, weight in before.items()
    )
    trained(pruned, tmp_path, KeepZeros())
    assert_zeros_kept(before, pruned)
    assert loss(pruned) < start
    assert not any(parameter._backward_hooks for parameter in pruned.parameters())


def test_other_optimisers(tmp_path: Path) -> None:
    model = prune_tiny(tiny_llama())
    before = sparse_weights(model)
    trained(
        model, tmp_path, KeepZeros(), optim="adafactor", gradient_accumulation_steps=2
    )
    assert_zeros_kept(before, model)


def test_a_packed_model_that_was_made_dense_is_trained_whole(
    pruned: PreTrainedModel, tmp_path: Path
) -> None:
    source = save_tiny(pruned, None, tmp_path / "dense")
    model: Any = sparsellm.load(
        sparsellm.pack(source, out=tmp_path / "packed", head="int8").path
    )
    model.dequantize()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    sparse = sparse_weights(model)
    trained(model, tmp_path / "run", KeepZeros())
    assert not [
        name
        for name, value in model.named_parameters()
        if torch.equal(value, before[name])
    ]
    assert_zeros_kept(sparse, model)


@pytest.mark.parametrize(
    "scale", [1.0, torch.inf]
)  # zeros times what is not finite would be NaN
def test_pruned_weights_do_not_count_in_the_norm_of_the_gradient(scale: float) -> None:
    model = prune_tiny(tiny_llama()).train()
    with ZeroKeeper(model) as keeper:
        (scale * model(input_ids=IDS, labels=IDS).loss).backward()
        for name, mask in keeper.masks.items():
            gradient = model.get_parameter(name).grad
            assert not gradient[~mask].any()
            assert gradient[mask].any()
            model.get_parameter(name).data += scale
        keeper.restore()
        assert not any(
            model.get_parameter(name)[~mask].any()
            for name, mask in keeper.masks.items()
        )
    with pytest.raises(ModelError, match="prune"):
        ZeroKeeper(tiny_llama())


peft = pytest.importorskip("peft")
lora = pytest.importorskip("sparsellm.tuning.lora")


def adapter_on(model: PreTrainedModel, **changes: Any) -> Any:
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        **changes,
    }
    return lora.add_adapter(model, peft.LoraConfig(**settings))


def test_a_trained_adapter_merges_without_a_change_of_logits_or_zeros(
    pruned: PreTrainedModel, tmp_path: Path
) -> None:
    before, untouched, start = sparse_weights(pruned), logits(pruned), loss(pruned)
    model = adapter_on(pruned, lora_dropout=0.1)
    assert torch.equal(logits(model), untouched)  # B starts at zero
    trained(model, tmp_path)
    assert loss(model) < start
    adapted = logits(model)
    assert not torch.allclose(adapted, untouched, atol=1e-2)
    with model.disable_adapter():
        assert torch.allclose(logits(model), untouched, atol=1e-6)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), adapted, atol=1e-4)
    assert_zeros_kept(before, merged)


def test_the_callback_does_not_hold_an_adapter_at_its_zeros(tmp_path: Path) -> None:
    model = prune_tiny(tiny_llama())
    for adapted in (
        adapter_on(copy.deepcopy(model)),
        peft.get_peft_model(model, peft.LoraConfig(r=4)),
    ):
        with pytest.raises(
            ModelError,
            match=r"has an adapter, whose zeros would be kept too; .*add_adapter",
        ):
            trained(adapted, tmp_path, KeepZeros())


def test_the_update_is_the_masked_product() -> None:
    layer = (
        adapter_on(prune_tiny(tiny_llama()))
        .base_model.model.model.layers[0]
        .mlp.up_proj
    )
    layer.lora_B["default"].weight.data.normal_()
    x, weight = torch.randn(5, 32), layer.base_layer.weight
    update = 8 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(
        layer(x), x @ (weight + (weight != 0) * update).t(), atol=1e-5
    )


def test_an_adapter_is_saved_and_loaded_with_its_mask(tmp_path: Path) -> None:
    base = prune_tiny(tiny_llama())
    before = sparse_weights(base)
    model = trained(adapter_on(copy.deepcopy(base)), tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    assert not [name for name in model.state_dict() if name.endswith("kept")]
    loaded = lora.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))
    assert_zeros_kept(before, loaded.merge_and_unload())
    for model, place, said in (
        (base, tmp_path, "holds no adapter that peft reads"),
        (
            prune_tiny(tiny_llama(hidden_size=16, head_dim=4)),
            tmp_path / "adapter",
            "peft refuses",
        ),
    ):
        with pytest.raises(RecipeError, match=said) as caught:
            lora.load_adapter(model, place)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_becomes_tuned_and_packed_again(tmp_path: Path) -> None:
    source = save_tiny(prune_tiny(tiny_llama()), None, tmp_path / "dense")
    first = sparsellm.pack(source, out=tmp_path / "packed")
    with pytest.raises(ModelError, match="unpack"):
        adapter_on(sparsellm.load(tmp_path / "packed"))
    tuned = trained(
        adapter_on(sparsellm.load(source)), tmp_path / "run"
    ).merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")
    assert (
        sparsellm.pack(tmp_path / "tuned", out=tmp_path / "again").packed_bytes
        == first.packed_bytes
    )
    assert torch.allclose(
        logits(sparsellm.load(tmp_path / "again")), logits(tuned), atol=1e-4
    )


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}]
)
def test_variants_that_cannot_keep_zeros_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(changes))):
        adapter_on(prune_tiny(tiny_llama()), **changes)


def test_what_peft_adapts_without_the_mask_is_refused() -> None:
    with pytest.raises(RecipeError, match="fill"):
        adapter_on(mixtral())
    for name in ("Qwen2Moe", "Dbrx"):
        with pytest.raises(RecipeError, match="leaves out the stacked experts"):
            lora.add_adapter(prune_tiny(family(name)))
    with pytest.raises(ModelError, match="share weights"):
        adapter_on(model := sharing_llama())
    assert not [
        name
        for name, parameter in model.named_parameters()
        if "lora" in name or not parameter.requires_grad
    ]
    for target, saved in (
        ("q_proj", "down_proj"),
        ("q_proj", "mlp"),
        ("lm_head", "model"),
    ):
        with pytest.raises(
            RecipeError,
            match=rf"modules_to_save has \S*{saved}, whose zeros would be trained",
        ):
            adapter_on(
                prune_tiny(tiny_llama()),
                target_modules=[target],
                modules_to_save=[saved],
            )
    model = prune_tiny(tiny_llama())
    model.lm_head.weight.data[5] = 0.0  # the row of a token that pads the vocabulary
    adapter_on(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(RecipeError, match=r"peft refuses to adapt this model: .*Mamba"):
        adapter_on(family("Mamba2"))
