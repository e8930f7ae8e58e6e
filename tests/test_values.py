"""``prune --values``: whole runs whose kept values are integers times a scale."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.chain import Feed, open_chain
from sparsellm.errors import NumericalError, StorageError
from sparsellm.methods import METHODS
from sparsellm.solvers import rounding
from sparsellm.storage.directory import partial_of
from sparsellm.storage.scratch import Scratch
from sparsellm.sweep import whole_model
from sparsellm.sweep.integers import Integers
from sparsellm.sweep.whole_model import _Run
from sparsellm.tables import print_packed
from sparsepack.codes import exponents_of_text
from sparsepack.grid import Groups, on_grid
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer
from tests.models.families import mixtral
from tests.sweep.helpers import CPU, dense_end, divergence, halved, ids_of, linear_weights, sharing_llama
from tests.test_resume import RECIPE, contents, fail_in_block

LOCAL: dict[str, Any] = {"method": "sparsegpt"}
GLOBAL: dict[str, Any] = {"method": "sparsellm", "effort": 0}
SWEPT: dict[str, Any] = {"method": "sparsellm", "passes": 2, "sweep_rate": 0.003}


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def is_on_grid(result: sparsellm.PruneResult, name: str, weight: Tensor) -> bool:
    """Whether a weight of int4 in fp32, by the name of its parameter, is on the grid that the result records."""
    exponents = {each.name: each.exponents for each in result.linears}[name.removesuffix(".weight")]
    return torch.equal(on_grid(weight.detach(), "int4", torch.float32, exponents_of_text(exponents)), weight)


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """The model with inputs of uneven size, for which columns take exponents."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                weight[::24] *= 8
    return model


@pytest.fixture(params=[tiny_llama, tiny_opt, tiny_gpt2], ids=lambda family: family.__name__)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family: Callable[..., PreTrainedModel] = request.param
    dtype = torch.float32 if family is tiny_opt else torch.bfloat16
    return save_tiny(uneven(family()).to(dtype), tiny_tokenizer(), tmp_path / "dense")


@pytest.mark.parametrize(
    ("fields", "values"), [(LOCAL, "int8"), (LOCAL, "int3"), (GLOBAL, "int4"), (SWEPT, "int4"), (SWEPT, "int8")]
)
def test_packing_the_result_loses_nothing(values: str, fields: dict[str, Any], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    result = sparsellm.prune(source, Recipe(**{**RECIPE, **fields, "values": values}), out=out)
    assert not sparsellm.pack(out, out=tmp_path / "packed", values=values).rounded
    sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again")
    assert same(tensors(out), tensors(tmp_path / "again"))
    assert any(each.exponents for each in result.linears)
    assert result.sparsity_pruned >= 0.6 - 1e-3
    report = json.loads((out / "pruning.json").read_text())
    assert report["values"] == report["recipe"]["values"] == values
    assert report["bits_per_weight"] == pytest.approx(result.bits_per_weight)
    if fields is SWEPT and values == "int4":  # int8 costs too little for tiny models to gain
        assert min(each.held_out for each in result.sweeps[1:]) < result.sweeps[0].held_out


def test_pack_says_what_it_rounds_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without its pruning.json the exponents of a run are unknown, so its values are on no known grid."""
    source = save_tiny(uneven(tiny_llama()).to(torch.bfloat16), tiny_tokenizer(), tmp_path / "dense")
    result = sparsellm.prune(source, Recipe(**{**RECIPE, **LOCAL, "values": "int4"}), out=tmp_path / "pruned")
    (tmp_path / "pruned" / "pruning.json").unlink()
    packed = sparsellm.pack(tmp_path / "pruned", out=tmp_path / "packed", values="int4")
    assert set(packed.rounded) == {each.name for each in result.linears if each.exponents}
    assert packed.to_dict()["rounded"] == packed.rounded
    print_packed(packed)
    assert f"note: {len(packed.rounded)} of {len(packed.linears)} linears were rounded" in capfd.readouterr().err
    assert not sparsellm.pack(tmp_path / "pruned", out=tmp_path / "kept").rounded


def test_bits_a_weight_are_those_of_the_packed_file(tmp_path: Path) -> None:
    source = save_tiny(tiny_llama(hidden_size=64, intermediate_size=256), tiny_tokenizer(), tmp_path / "dense")
    for values, pattern, near in (
        ("int4", None, 0.02),
        ("int3", None, 0.02),
        ("int8", None, 0.02),
        ("int4", "2:4", 0),
        ("int8", "4:8", 0),
        ("int3", "1:8", 0),
    ):  # rows of other patterns keep different numbers of values, of which each counts an even one
        name = f"{values}-{pattern}".replace(":", "-")
        fields = {**RECIPE, "values": values, "pattern": pattern, "sparsity": 0.6 if pattern is None else None}
        result = sparsellm.prune(
            source, {key: value for key, value in fields.items() if value is not None}, out=tmp_path / name
        )
        packed = sparsellm.pack(tmp_path / name, out=tmp_path / f"packed-{name}", values=values).to_dict()
        assert result.bits_per_weight == pytest.approx(packed["bits_per_weight"], abs=near, rel=1e-9), name


def test_n_of_m_stays(tmp_path: Path) -> None:
    recipe = Recipe(**{**RECIPE, "sparsity": 0.5, "pattern": "2:4", "values": "int4"})
    model = tiny_opt()
    sparsellm.prune(model, recipe, calibration=ids_of(4))
    for name, weight in linear_weights(model).items():
        assert bool(((weight != 0).view(-1, 4).sum(1) == 2).all()), name


@pytest.mark.parametrize("fields", [LOCAL, GLOBAL, SWEPT], ids=["local", "global", "swept"])
def test_sparsity_0_is_quantisation(fields: dict[str, Any]) -> None:
    recipe = Recipe(**{**RECIPE, **fields, "sparsity": 0.0, "values": "int4"})
    dense, model, nearest = tiny_llama(), tiny_llama(), tiny_llama()
    result = sparsellm.prune(model, recipe, calibration=ids_of(8))
    for name, weight in linear_weights(model).items():
        assert not torch.equal(weight, linear_weights(dense)[name]), name
        assert is_on_grid(result, name, weight), name
    assert result.bits_per_weight == pytest.approx(4.5, abs=0.3)  # a mask of one row and exponents of columns
    with torch.no_grad():
        for weight in linear_weights(nearest).values():
            weight.copy_(on_grid(weight, "int4", torch.float32))
        assert divergence(dense, model, ids_of(8)) < 0.7 * divergence(dense, nearest, ids_of(8))


def test_later_linears_see_the_rounded_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of every Gram matrix that the rounding gets are those of the model as it is written so far."""
    grams: list[Tensor] = []
    plain = rounding.rounded

    def recorded(weight: Tensor, gram: Any, *rest: Any, **named: Any) -> Any:
        grams.append(gram.matrix)
        return plain(weight, gram, *rest, **named)

    monkeypatch.setattr("sparsellm.methods.task.rounded", recorded)
    model, ids = tiny_llama(), ids_of(4)
    options = {"norm_weighting": 0.0, "refit": False}
    sparsellm.prune(
        model, Recipe(sparsity=0.5, values="int4", effort=0, options=options, products="float32"), calibration=ids
    )
    seen: list[Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2)))
        model(ids)
    expected = seen[0].T @ seen[0] / len(seen[0])
    assert any(each.shape == expected.shape and torch.allclose(each, expected, rtol=1e-3, atol=1e-6) for each in grams)


def test_the_judge_and_the_steps_see_rounded_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The divergence before the first pass is that of the model that effort 0 writes, which has the same rounding."""
    source = save_tiny(tiny_opt(), tiny_tokenizer(), tmp_path / "dense")
    ids = ids_of(4)
    fields = {"sparsity": 0.5, "values": "int4", "products": "float32"}
    sparsellm.prune(source, Recipe(**fields, effort=0), calibration=ids, out=tmp_path / "walked")
    losses: list[float] = []
    step = _Run.step

    def counted(self: Any, piece: Any, *rest: Any) -> float:
        losses.append(step(self, piece, *rest) / self.ids(piece).numel())
        return losses[-1] * self.ids(piece).numel()

    monkeypatch.setattr(_Run, "step", counted)
    swept = sparsellm.prune(
        source, Recipe(**fields, passes=1, sweep_rate=1e-9), calibration=ids, out=tmp_path / "swept"
    )
    walked = AutoModelForCausalLM.from_pretrained(tmp_path / "walked")
    expected = float(divergence(tiny_opt(), walked, ids).detach())
    assert swept.sweeps[0].held_out == pytest.approx(expected, rel=1e-3)
    assert losses[0] == pytest.approx(expected, rel=1e-3)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "swept")
    assert same(linear_weights(walked), linear_weights(written))  # no step was large enough to change a whole number


def test_straight_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of each weight is that of its rounded value, computed by autograd on the whole rounded model, and
    that of a group's factor is how the loss changes if all its rounded values grow together."""
    found: dict[str, Tensor] = {}

    def recorded(parameters: dict[str, nn.Parameter], *_: Any, **__: Any) -> None:
        found.update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})

    monkeypatch.setattr(whole_model, "adam_step", recorded)
    dense, model, plain, ids = tiny_gpt2(), halved(tiny_gpt2()), halved(tiny_gpt2()), ids_of(2)
    chain = open_chain(model, device=CPU)
    names = [linear.name for index in range(len(chain)) for linear in chain.linears(index)]
    before = {name: weight.detach().clone() for name, weight in linear_weights(model).items()}
    task = whole_model.SweepTask(
        Feed(chain, ids, 96, Scratch()), dense_end(dense, ids, 96), 1, 0, lambda index: None, learning_rate=0.01,
        integers=Integers("int4", dict.fromkeys(names, "")),
    )  # fmt: skip
    whole_model.sweep(task)
    with torch.no_grad():
        for name, weight in linear_weights(plain).items():
            weight.copy_(on_grid(weight.t().contiguous(), "int4", torch.float32).t())
            assert not torch.equal(weight, before[name])
    divergence(dense, plain, ids).backward()
    several = False
    for name, weight in linear_weights(plain).items():
        assert weight.grad is not None
        assert torch.allclose(found[name], weight.grad, rtol=1e-3, atol=1e-6), name
        seen, slope = weight.detach().t(), weight.grad.t()
        size = Groups.of(seen, "int4").size
        several = several or size < seen.shape[1]
        for group, start in enumerate(range(0, seen.shape[1], size)):
            part = slice(start, start + size)
            expected = (slope[:, part] * seen[:, part]).sum(dim=1)
            assert torch.allclose(found[f"{name}.factors"][:, group], expected, rtol=1e-2, atol=1e-6), name
    assert several, "every row is one group"
    for name, weight in linear_weights(model).items():  # as it is written: no step was taken
        assert torch.equal(weight, linear_weights(plain)[name]), name


@pytest.mark.parametrize("method", sorted(METHODS))
def test_resumes_with_the_same_bits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tiny_llama().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "dense")
    swept = SWEPT if method == "sparsellm" else {}
    fields = {**RECIPE, **swept, "method": method, "dtype": "float32", "allocation": "uniform"}
    recipe = Recipe(**fields, values="int4")
    sparsellm.prune(source, recipe, out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        fail_in_block(1, patched, after=2 if method == "sparsellm" else 0)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, recipe, out=tmp_path / "p")
    assert partial_of(tmp_path / "p").exists()
    torch.manual_seed(12345)
    assert sparsellm.prune(source, recipe, out=tmp_path / "p").resumed == 1
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def test_a_sweep_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops in its second pass; blocks and passes hold unrounded values."""
    source = save_tiny(tiny_llama().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "dense")
    recipe = Recipe(**{**RECIPE, **SWEPT, "values": "int4", "dtype": "float32"})
    sparsellm.prune(source, recipe, out=tmp_path / "whole")
    judge, judged = _Run.judge, 0

    def failing(self: Any, judges: Any) -> float:
        nonlocal judged
        judged += 1
        if judged > 2:
            raise NumericalError("the processor caught fire")
        return judge(self, judges)

    with monkeypatch.context() as patched:
        patched.setattr(_Run, "judge", failing)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, recipe, out=tmp_path / "p")
    assert sparsellm.prune(source, recipe, out=tmp_path / "p").resumed == 3
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def test_weights_that_blocks_share_are_rounded_once() -> None:
    model, ids = sharing_llama(), ids_of(4)
    recipe = Recipe(**SWEPT, sparsity=0.5, values="int4", products="float32")
    result = sparsellm.prune(model, recipe, calibration=ids)
    recorded = {id(model.get_submodule(each.name).weight): each.name for each in result.linears}
    for name, weight in linear_weights(model).items():
        assert is_on_grid(result, recorded[id(weight)], weight), name


def test_other_values_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tiny_opt(), tiny_tokenizer(), tmp_path / "dense")
    with monkeypatch.context() as patched:
        fail_in_block(1, patched)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "p")
    with pytest.raises(sparsellm.SparseLLMError, match="values"):
        sparsellm.prune(source, Recipe(**RECIPE, values="int4"), out=tmp_path / "p")


def test_experts_are_rounded_too() -> None:
    model = mixtral()
    recipe = Recipe(sparsity=0.5, values="int4", effort=0)
    result = sparsellm.prune(model, recipe, calibration=ids_of(4))
    chain = open_chain(model, device=torch.device("cpu"))
    for index in range(len(chain)):
        with chain.block(index):
            for linear in chain.linears(index):
                weight = linear.weight()
                if linear.name.endswith("gate"):
                    assert not torch.equal(on_grid(weight, "int4", linear.storage_dtype), weight), linear.name
                else:
                    assert is_on_grid(result, linear.name, weight), linear.name


def test_exponents_are_needed_to_pack_without_loss(source: Path, tmp_path: Path) -> None:
    """They stand in pruning.json; without it the values are rounded to nearest."""
    out = tmp_path / "pruned"
    sparsellm.prune(source, Recipe(**{**RECIPE, **LOCAL, "values": "int4"}), out=out)
    content = json.loads((out / "pruning.json").read_text())
    changed: list[tuple[Callable[[Any], object], str]] = [
        (lambda linear: linear.update(exponents="12x"), "exponents is '12x'"),
        (lambda linear: linear.update(exponents="88"), "2 exponents of"),
        (lambda linear: linear.update(name="no such"), "no such linear"),
    ]
    at = next(index for index, linear in enumerate(content["linears"]) if linear["exponents"])
    for change, said in changed:
        other = json.loads(json.dumps(content))
        change(other["linears"][at])
        (out / "pruning.json").write_text(json.dumps(other))
        with pytest.raises(StorageError, match=said):
            sparsellm.pack(out, out=tmp_path / "packed", values="int4")
        assert not (tmp_path / "packed").exists()
    (out / "pruning.json").unlink()
    sparsellm.pack(out, out=tmp_path / "packed", values="int4")
    sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again")
    assert not same(tensors(out), tensors(tmp_path / "again"))


@pytest.mark.parametrize("values", ["int4", "int3"])
def test_a_packed_model_with_exponents_computes_as_pruned(values: str, tmp_path: Path) -> None:
    """In fp32 and unpacked for many tokens, so that both multiply by the same numbers."""
    source = save_tiny(uneven(tiny_llama()), tiny_tokenizer(), tmp_path / "dense")
    out, ids = tmp_path / "pruned", ids_of(2)
    sparsellm.prune(source, Recipe(**{**RECIPE, **LOCAL, "values": values}), out=out)
    packed = sparsellm.pack(out, out=tmp_path / "packed", values=values).path
    assert values == "int3" or any(name.endswith("weight_exponents") for name in tensors(packed))
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        found = sparsellm.load(packed, dtype="float32")
        assert torch.equal(found(ids).logits, dense(ids).logits)
        found.save_pretrained(tmp_path / "saved")
        again = sparsellm.load(tmp_path / "saved", dtype="float32")
        assert torch.equal(again(ids).logits, dense(ids).logits)
