"""The walk against a plain reference that holds the whole model, and what it writes against what it has in memory."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import sparsellm
from sparsellm import Recipe, parallel
from sparsellm.errors import DataError, NumericalError, RecipeError
from sparsellm.method.blocks.task import METHODS, BlockTask
from sparsellm.method.gram import Gram
from sparsellm.method.solvers import SOLVERS, Solution
from sparsellm.patterns import NM
from tests.files.small import tensors_of
from tests.method.sweep.helpers import Family, ids_of
from tests.model.outputs import hooked
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer
from tests.report.pages import rewrite
from tests.shares import Share, violations, zeros_of

IDS = ids_of(6, seed=3)


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def reference(
    model: PreTrainedModel, ids: Tensor, solver: str, sparsity: float
) -> PreTrainedModel:
    """Layer by layer, with nothing clever: the whole model is run for every block, all inputs are kept in fp64."""
    model = copy.deepcopy(model)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    for block in lists[0]:
        inputs: dict[str, list[Tensor]] = {}
        handles = [
            module.register_forward_hook(
                lambda m, args, out, name=name, inputs=inputs: inputs.setdefault(
                    name, []
                ).append(args[0].flatten(0, -2))
            )
            for name, module in linears_of(block).items()
        ]
        with torch.no_grad():
            for row in ids:
                model(row[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, module in linears_of(block).items():
            X = torch.cat(inputs[name]).double()
            gram = Gram((X.T @ X / len(X)).float(), len(X))
            weight = module.weight.detach()
            weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
            solved = (
                SOLVERS[solver].function(weight.clone(), gram, Share(sparsity)).weight
            )
            module.weight.data.copy_(solved.T if isinstance(module, Conv1D) else solved)
    return model


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_the_walk_equals_a_plain_reference(family: Family, solver: str) -> None:
    model = family()
    expected = reference(model, IDS, solver, 0.5)
    # 2 windows
    sparsellm.prune(
        model, Recipe(method=solver, sparsity=0.5, batch_tokens=48), calibration=IDS
    )
    for (name, pruned), plain in zip(
        model.named_parameters(), expected.parameters(), strict=True
    ):
        disagree = ((pruned == 0) != (plain == 0)).float().mean()
        # a score at the threshold may fall to either side of rounding
        assert disagree < 0.002, name
        if disagree == 0:
            torch.testing.assert_close(pruned, plain, rtol=2e-3, atol=2e-4)


def test_from_disk_to_disk_equals_in_memory(family: Family, tmp_path: Path) -> None:
    source = save_tiny(family(), tiny_tokenizer(), tmp_path / "dense")
    recipe = Recipe(method="sparsegpt", sparsity=0.6)
    in_memory = sparsellm.prune(source, recipe, calibration=IDS)
    on_disk = sparsellm.prune(source, recipe, calibration=IDS, out=tmp_path / "pruned")
    assert on_disk.path == tmp_path / "pruned"
    assert in_memory.model is not None
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(on_disk.path)(IDS).logits,
        in_memory.model(IDS).logits,
    )
    before, after = (
        AutoTokenizer.from_pretrained(place) for place in (source, tmp_path / "pruned")
    )
    assert after("import this") == before("import this")
    assert [linear.zeros for linear in on_disk.linears] == [
        linear.zeros for linear in in_memory.linears
    ]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize("pattern", [Share(0.37), NM(2, 4)])
def test_sparsity_is_exact_in_every_linear_and_only_there(
    method: str, pattern: Any, tmp_path: Path
) -> None:
    source = save_tiny(tiny_opt(), tiny_tokenizer(), tmp_path / "dense")
    kind = {"pattern": "2:4"} if isinstance(pattern, NM) else {"sparsity": 0.37}
    result = sparsellm.prune(
        source, Recipe(method=method, **kind), calibration=IDS, out=tmp_path / "pruned"
    )
    dense, pruned = tensors_of(source), tensors_of(tmp_path / "pruned")
    assert dense.keys() == pruned.keys()
    names = {f"{linear.name}.weight" for linear in result.linears}
    assert len(names) == 12
    for name, weight in pruned.items():
        if name in names:
            assert int((weight == 0).sum()) == zeros_of(pattern, weight.shape)
            assert not isinstance(pattern, NM) or violations(pattern, weight) == 0
        else:
            assert torch.equal(weight, dense[name])
        assert not bool((torch.signbit(weight) & (weight == 0)).any())  # no -0.0


def test_what_stands_next_to_the_weights(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    source = save_tiny(tiny_llama(), tokenizer, tmp_path / "dense")
    rewrite(source / "config.json", sparsity_config={"format": "dense"})
    (source / "modeling_evil.py").write_text("raise SystemExit")
    result = sparsellm.prune(
        source, Recipe(method="wanda", seed=5), calibration=IDS, out=tmp_path / "pruned"
    )
    written = tmp_path / "pruned"
    assert Recipe.from_yaml(written / "recipe.yaml") == result.recipe
    report = json.loads((written / "pruning.json").read_text())
    assert report["seed"] == 5
    assert report["linears"][0]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert 0 < report["linears"][0]["error"] < 1
    assert report["versions"]["torch"] == torch.__version__
    assert not {"sparsity_config", "quantization_config"} & set(
        json.loads((written / "config.json").read_text())
    )
    assert (
        AutoTokenizer.from_pretrained(written).chat_template == tokenizer.chat_template
    )
    assert (written / "generation_config.json").is_file()
    assert not list(written.glob("*.py"))
    assert not (tmp_path / "pruned.partial").exists()


def test_code_of_a_checkpoint_runs_if_trusted_and_is_not_copied(tmp_path: Path) -> None:
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    classes = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineLM"}
    rewrite(source / "config.json", model_type="mine", auto_map=classes)
    (source / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n\n\n"
        "class MineLM(LlamaForCausalLM):\n    config_class = Mine\n"
    )
    recipe = Recipe(method="wanda", calibration="self", samples=2, seq_len=16)
    with pytest.raises(sparsellm.SparseLLMError, match="transformers cannot read"):
        sparsellm.prune(source, recipe, out=tmp_path / "pruned")
    result = sparsellm.prune(
        source, recipe, out=tmp_path / "pruned", trust_remote_code=True
    )
    assert any(
        "code that came with the model is not copied" in warning
        for warning in result.warnings
    )
    assert not list((tmp_path / "pruned").glob("*.py"))


def scaled(part: str, factor: float) -> Any:
    """A Llama with some of its weights multiplied."""
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(factor if part in name else 1.0)
    return model


@pytest.mark.parametrize(
    "method", ["magnitude", "wanda", "sparsegpt", "admm", "sparsellm"]
)
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_tiny_and_huge_weights_get_the_sparsity_asked(
    method: str, pattern: str | None
) -> None:
    kind: dict[str, Any] = (
        {"pattern": pattern} if pattern else {"sparsity": 0.7, "allocation": "uniform"}
    )
    if method == "sparsellm":  # whose gradients of the loss are refused beyond fp32
        kind |= {"effort": 0, "options": {"output_metric": 0.0}}
    recipe = Recipe(method=method, **kind)
    for factor in (1e-30, 1e25):
        result = sparsellm.prune(scaled("q_proj", factor), recipe, calibration=IDS)
        assert all(
            linear.sparsity == pytest.approx(linear.asked, abs=2e-3)
            for linear in result.linears
        )
        assert all(linear.error > 1e-3 for linear in result.linears)
    for part, reader, factor in (
        ("v_proj", "0.self_attn.o_proj", 1e-30),
        ("up_proj", "0.mlp.down_proj", 1e25),
    ):
        with pytest.raises(NumericalError, match=rf"^model\.layers\.{reader}: [^\n]+$"):
            sparsellm.prune(scaled(part, factor), recipe, calibration=IDS)


def test_a_linear_whose_inputs_are_zero_is_pruned_by_size() -> None:
    result = sparsellm.prune(
        scaled("0.self_attn.v_proj", 0.0), Recipe(method="sparsegpt"), calibration=IDS
    )
    assert "magnitude: model.layers.0.self_attn.o_proj;" in result.warnings[-1]
    (linear,) = (
        linear
        for linear in result.linears
        if linear.name == "model.layers.0.self_attn.o_proj"
    )
    assert linear.sparsity == pytest.approx(0.5, abs=2e-3)


def test_kept_weights_too_small_for_the_dtype_are_refused() -> None:
    @METHODS.register("vanishing", paper="none")
    def vanishing(task: BlockTask) -> None:
        for linear in task.linears:
            weight, gram = linear.weight(), Gram(torch.eye(linear.in_features), 1)
            mask = task.patterns[linear.name].mask(weight.abs())
            task.accept(linear, weight, Solution(weight * mask * 1e-9, mask, 1.0), gram)

    try:
        with pytest.raises(
            NumericalError,
            match=r"q_proj: 512 of its 1024 weights would be kept .* float16",
        ):
            sparsellm.prune(
                tiny_llama().half(), Recipe(method="vanishing"), calibration=IDS
            )
    finally:
        del METHODS["vanishing"]


@pytest.mark.usefixtures("forgotten_plugins")
def test_random_numbers_of_a_block_follow_the_seed_and_the_block() -> None:
    drawn: list[float] = []

    @METHODS.register("drawing", paper="none")
    def drawing(task: BlockTask) -> None:
        drawn.append(float(torch.rand(1)))
        METHODS["magnitude"].function(task)
        torch.rand(7)

    for seed in (1, 2, 1):
        recipe = Recipe(method="drawing", seed=seed)
        sparsellm.prune(tiny_llama(), recipe, calibration=IDS)
    assert drawn[:3] == drawn[6:]
    assert len(set(drawn)) == 6


def test_an_already_pruned_model_is_said_and_pruned_further() -> None:
    model = tiny_llama()
    sparsellm.prune(model, Recipe(method="magnitude", sparsity=0.5), calibration=IDS)
    result = sparsellm.prune(
        model, Recipe(method="magnitude", sparsity=0.7), calibration=IDS
    )
    assert any("already pruned: 50.0%" in warning for warning in result.warnings)
    sparsellm.prune(
        later := tiny_llama(),
        Recipe(method="magnitude", exclude=["*.layers.0.*"]),
        calibration=IDS,
    )
    assert sparsellm.evaluate(model, IDS, against=later).against.recovery is None  # type: ignore[union-attr]
    assert result.sparsity == pytest.approx(0.7, abs=1e-3)


def test_bad_calls_are_refused_before_any_work() -> None:
    with pytest.raises(DataError, match="tokenizer"):
        sparsellm.prune(tiny_llama(), Recipe(method="magnitude"))
    with pytest.raises(DataError, match="seq_len is 500"):
        sparsellm.prune(
            tiny_llama(), Recipe(method="magnitude"), calibration=ids_of(2, 500)
        )
    with pytest.raises(RecipeError, match="16 does not divide"):
        sparsellm.prune(
            tiny_llama(intermediate_size=72),
            Recipe(method="wanda", pattern="3:16"),
            calibration=IDS,
        )


@pytest.mark.parametrize("tiny", [tiny_opt, tiny_gpt2])
def test_biases_keep_the_mean_of_the_outputs(tiny: Family) -> None:
    """Those of attention in the first block, without weights of tokens: no pruning changes the inputs of q, k, v."""
    dense, ids = tiny(), ids_of(4, seed=1)
    model = copy.deepcopy(dense)
    recipe = Recipe(
        sparsity=0.7, effort=0, allocation="uniform", options={"norm_weighting": 0}
    )
    sparsellm.prune(model, recipe, calibration=ids)
    of_the_first = [name for name in linears_of(dense) if ".0." in name]
    names = [
        name
        for name in of_the_first
        if re.search(r"[qkv]_proj|c_attn|out_proj|attn\.c_proj", name)
    ]
    before, after = (
        [network.get_submodule(name) for name in names] for network in (dense, model)
    )
    assert names
    for *both, one, other in zip(
        hooked(dense, before, ids),
        hooked(model, after, ids),
        before,
        after,
        strict=True,
    ):
        expected, actual = (output.flatten(0, 1).mean(dim=0) for output in both)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
        assert not torch.equal(one.bias, other.bias)


def test_a_model_object_stays_in_its_mode() -> None:
    model = tiny_llama().train()
    with pytest.raises(RecipeError, match="leaves nothing to prune"):
        sparsellm.prune(model, Recipe(only=["nothing"]), calibration=IDS)
    assert model.training
    assert model.model.layers[0].training


def test_processes_of_different_ways_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = parallel.gather
    way = "torch.float32 on cpu"
    monkeypatch.setattr(
        parallel,
        "gather",
        lambda item: [*gather(item), *([f"{way}, in fp8"] if item == way else [])],
    )
    with pytest.raises(
        RecipeError,
        match=r"different ways \(torch.float32 on cpu; .*fp8\); set device, dtype",
    ):
        sparsellm.prune(
            llama,
            Recipe(method="wanda", products="float32"),
            out=tmp_path / "out",
            calibration=IDS,
        )
