"""Training keeps every zero, and what an adapter computes is what its merge computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import sparsellm
from sparsellm.errors import ModelError
from sparsellm.tuning.full import KeepZeros, ZeroKeeper
from tests.method.sweep.helpers import ids_of
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt
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


def test_the_callback_does_not_hold_an_adapter_at_its_zeros(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(prune_tiny(tiny_llama()), peft.LoraConfig(r=4))
    with pytest.raises(
        ModelError,
        match=r"has an adapter, whose zeros would be kept too; .*examples/lora\.py",
    ):
        trained(adapted, tmp_path, KeepZeros())
