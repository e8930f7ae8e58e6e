"""Experts are removed from mixtures: what is left is the model that one would build by hand, and runs everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe, parallel
from sparsellm.errors import ModelError, RecipeError, StorageError
from sparsellm.method.experts import sample
from sparsellm.method.experts.sample import Sample
from sparsellm.method.experts.scores import SCORES, MixtureView
from tests.files.small import tree
from tests.killing import stop_after_one
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.families import MIXTURES, family, mixtral
from tests.report.pages import rewrite

IDS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(3))
RECIPE: dict[str, Any] = {
    "sparsity": 0.0,
    "samples": 6,
    "seq_len": 24,
    "batch_tokens": 48,
    "experts": 2,
}
EIGHT = {"num_local_experts": 8, "num_experts": 8, "n_routed_experts": 8}


def removed(source: Path, out: Path, **changes: Any) -> sparsellm.PruneResult:
    return sparsellm.prune(
        source, Recipe(**{**RECIPE, **changes}), out=out, calibration=IDS
    )


def loaded(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True).eval()


def by_hand(
    dense: PreTrainedModel, small: PreTrainedModel, kept: dict[int, list[int]]
) -> PreTrainedModel:
    """A model of the small one's config with the rows of the dense one's tensors that belong to ``kept`` experts."""
    made, values = type(small)(small.config).eval(), dense.state_dict()
    for name, value in made.state_dict().items():
        source = values[name]
        for dim, (many, few) in enumerate(zip(source.shape, value.shape, strict=True)):
            if many != few:
                block = int(
                    name.split("layers." if "layers." in name else "blocks.")[
                        1
                    ].partition(".")[0]
                )
                rows = (
                    torch.arange(many)
                    .view(len(kept[block]) * many // few, -1)[kept[block]]
                    .flatten()
                )
                source = source.index_select(dim, rows)
        value.copy_(source)
    return made


@pytest.mark.parametrize("name", sorted(MIXTURES))
@torch.no_grad()
def test_what_is_left_is_the_model_built_by_hand(name: str, tmp_path: Path) -> None:
    dense = family(name, **EIGHT)
    source = save_tiny(dense, None, tmp_path / "dense")
    rewrite(source / "config.json", **EIGHT)  # by every name that a family has for it
    result = removed(
        source, tmp_path / "small", experts=4, expert_refit=False, effort=0
    )
    small = loaded(tmp_path / "small")
    kept = {mixture.block: mixture.kept for mixture in result.experts}
    assert {len(numbers) for numbers in kept.values()} == {4}
    assert torch.equal(
        small(IDS).logits, by_hand(loaded(source), small, kept)(IDS).logits
    )
    info = type(dense).from_pretrained(tmp_path / "small", output_loading_info=True)[1]
    assert not [*info["missing_keys"], *info["unexpected_keys"]]
    assert small.num_parameters() < dense.num_parameters()
    assert not (tmp_path / "small-experts").exists()
    assert result.seconds["experts"] > 0


@pytest.mark.parametrize("name", ["DeepseekV3", "GptOss", "Mixtral"])
def test_a_removal_is_cut_short_resumed_and_rounded(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    # with which routers change too
    monkeypatch.setattr("sparsellm.method.experts.sample.STEPS", 20)
    source = save_tiny(
        family(name, **EIGHT).to(torch.bfloat16), None, tmp_path / "dense"
    )
    recipe = {"experts": 4, "values": "int4", "method": "sparsegpt"}
    cut = stop_after_one("experts")
    removed(source, tmp_path / "whole", **recipe)
    with pytest.raises(KeyboardInterrupt):
        sparsellm.prune(
            source,
            Recipe(**{**RECIPE, **recipe}),
            out=tmp_path / "cut",
            calibration=IDS,
            progress=cut,
        )
    result = removed(source, tmp_path / "cut", **recipe)
    uncut, resumed = tree(tmp_path / "whole"), tree(tmp_path / "cut")
    written = [file for file in uncut if file.endswith((".safetensors", "config.json"))]
    assert len(written) > 3
    assert all(uncut[file] == resumed[file] for file in written)
    assert len(
        [linear for linear in result.linears if ".experts." in linear.name]
    ) == 3 * 4 * len(result.experts)
    assert result.bits_per_weight is not None
    assert loaded(tmp_path / "cut")(IDS).logits.isfinite().all()


def test_a_refit_lowers_the_error_and_composes_with_zeros_and_int4(
    tmp_path: Path,
) -> None:
    source = save_tiny(mixtral(), None, tmp_path / "dense")
    result = removed(
        source, tmp_path / "small", sparsity=0.5, method="sparsegpt", values="int4"
    )
    assert all(mixture.refitted < mixture.error for mixture in result.experts)
    assert result.sparsity > 0.49
    assert {
        entry.name.split(".experts.")[1][0]
        for entry in result.linears
        if ".experts." in entry.name
    } == {"0", "1"}
    assert result.base.name == "dense"
    record = json.loads((tmp_path / "small" / "pruning.json").read_text())
    assert record["experts"][0]["tokens"] == result.experts[0].tokens
    card, page = (
        (tmp_path / "small" / name).read_text() for name in ("README.md", "report.html")
    )
    assert "| experts of each mixture | 2 of 4, kept by `coordinated` |" in card
    assert "2 of 4 experts stayed in each mixture" in page
    assert ", score " in page
    assert loaded(tmp_path / "small")(IDS).logits.isfinite().all()


@pytest.mark.parametrize("refit", [True, False])
@torch.no_grad()
def test_the_error_left_is_that_of_the_mixture_that_is_written(
    refit: bool, tmp_path: Path
) -> None:
    """Of the first block, whose inputs the removal does not change."""
    dense, inputs = mixtral(), list[Tensor]()
    result = removed(
        save_tiny(dense, None, tmp_path / "dense"),
        tmp_path / "small",
        effort=0,
        expert_refit=refit,
    )
    first, second = (
        model.model.layers[0].mlp
        for model in (dense.eval(), loaded(tmp_path / "small"))
    )
    first.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    dense(IDS)
    expected, made = (mixture(inputs[0]) for mixture in (first, second))
    error = float((expected - made).square().sum() / expected.square().sum())
    assert result.experts[0].refitted == pytest.approx(error, rel=1e-3)
    assert refit == (result.experts[0].refitted != result.experts[0].error)
    assert refit == (" refitted." in (tmp_path / "small" / "report.html").read_text())


@pytest.mark.parametrize("name", ["DeepseekV3", "GptOss", "Mixtral"])
def test_routers_are_fitted_where_that_helps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every expert is there twice, so that the one can have the tokens of the other."""
    dense = family(name, **EIGHT)
    for key, value in dense.named_parameters():
        if ".experts." in key:
            value.data[4:] = value.data[:4].clone()
    source = save_tiny(dense, None, tmp_path / "dense")
    ids = torch.randint(4, 300, (32, 64), generator=torch.Generator().manual_seed(3))
    changes = {"experts": 4, "samples": 32, "seq_len": 64, "expert_score": "reap"}
    recipe = Recipe(**RECIPE | changes, effort=0)
    errors = []
    for steps in (0, sample.STEPS):
        monkeypatch.setattr(sample, "STEPS", steps)
        out = tmp_path / str(steps)
        result = sparsellm.prune(source, recipe, out=out, calibration=ids)
        errors.append(sum(mixture.refitted for mixture in result.experts))
    assert errors[1] < 0.999 * errors[0]


def test_a_repeat_with_other_experts_is_refused_before_the_removal(
    tmp_path: Path, monkeypatch: Any
) -> None:
    source, given = (
        save_tiny(mixtral(), None, tmp_path / "dense"),
        {"out": tmp_path / "out", "calibration": IDS},
    )
    for phase in ("experts", "prune"):
        monkeypatch.setattr(
            "sparsellm.run.journal.versions", lambda phase=phase: {"place": phase}
        )
        with pytest.raises(KeyboardInterrupt):
            sparsellm.prune(
                source, Recipe(**RECIPE), progress=stop_after_one(phase), **given
            )
    before = tree(tmp_path / "out-experts")
    with pytest.raises(
        StorageError, match=r"recipe\.experts is 2.* there and 3.* here"
    ):
        sparsellm.prune(source, Recipe(**{**RECIPE, "experts": 3}), **given)
    assert tree(tmp_path / "out-experts") == before
    said = "blocks up to 1 were pruned with place experts, those after them with place prune"
    assert said in sparsellm.prune(source, Recipe(**RECIPE), **given).warnings


def test_tokens_of_a_sample_are_numbered_over_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "gather", lambda count: [5, 7, count])
    monkeypatch.setattr(parallel, "rank", lambda: 2)
    nothing: Any = None
    assert Sample(nothing, 0, nothing, nothing, torch.zeros(6, 1)).first == 12


def test_a_plan_has_the_removal_and_the_smaller_model(tmp_path: Path) -> None:
    many, few = (
        save_tiny(
            family("Mixtral", **dict.fromkeys(EIGHT, count)),
            tiny_tokenizer(),
            tmp_path / str(count),
        )
        for count in (8, 2)
    )
    recipe = {"samples": 64, "seq_len": 32, "effort": 1}
    plan = sparsellm.plan(many, {**recipe, "experts": 0.75})
    alone = sparsellm.plan(few, recipe)
    door = sparsellm.dry_run(
        many, {**recipe, "experts": 0.75, "calibration": "pydoc"}, out=tmp_path / "out"
    )
    assert not list(tmp_path.glob("out*"))
    assert (plan.tokens, plan.disk_bytes) == (door.tokens, door.disk_bytes)
    assert plan.tokens["experts"] == 64 * 32
    assert all(
        plan.seconds[name] == pytest.approx(alone.seconds[name])
        for name in ("prune", "sweep")
    )
    assert plan.seconds["experts"] > 0
    assert plan.seconds["gradients"] > alone.seconds["gradients"]
    assert plan.disk_bytes > alone.disk_bytes
    unscored = sparsellm.plan(many, {**recipe, "experts": 0.75, "expert_score": "reap"})
    assert unscored.seconds["gradients"] < plan.seconds["gradients"]


def test_inspect_says_which_experts_can_go(
    llama: Path, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    source = save_tiny(
        family("DeepseekV3", **EIGHT), tiny_tokenizer(), tmp_path / "deep"
    )
    said = "mixtures: 8 experts in 1 of 2 blocks, 2 for a token, 1 shared, 2 groups; prune --experts can keep 4 or more"
    assert said in " ".join(run("inspect", source, exits=0)[1].split())
    source = save_tiny(
        mixtral(num_experts_per_tok=4), tiny_tokenizer(), tmp_path / "all"
    )
    mixtures = json.loads(run("inspect", source, "--json")[1])["mixtures"]
    assert mixtures["experts"] == {"0": 4, "1": 4}
    assert (mixtures["least"], mixtures["why"]) == (4, "routing needs all 4 experts")
    # a config without such a number
    monkeypatch.setattr("sparsellm.method.experts.fewer.NUMBERS", ())
    assert (
        "has no number in its config"
        in json.loads(run("inspect", source, "--json")[1])["mixtures"]["why"]
    )
    with pytest.raises(ModelError, match="has no number in its config"):
        removed(source, tmp_path / "small", experts=3)
    assert json.loads(run("inspect", llama, "--json")[1])["mixtures"] is None


def test_a_comparison_has_runs_with_fewer_experts(tmp_path: Path, run: Any) -> None:
    source = save_tiny(mixtral(), tiny_tokenizer(), tmp_path / "dense")
    line = (
        "compare",
        source,
        "--out",
        tmp_path / "compared",
        "--method",
        "wanda",
        "--sparsity",
        "0.5",
    )
    line += (
        "--experts",
        "0.25,2",
        "--text-seq-len",
        32,
        "--max-tokens",
        256,
        "--samples",
        4,
        "--seq-len",
        32,
    )
    told = json.loads(run(*line, "--calibration", "pydoc", "--json", exits=0)[1])
    cells = {cell["name"]: cell["packed_bytes"] for cell in told["cells"]}
    assert cells["wanda-0.5-experts0.25"] > cells["wanda-0.5-experts2"]


def view(**changes: Any) -> MixtureView:
    known: dict[str, Any] = {
        "block": 0, "keep": 2, "groups": 1, "tokens": torch.tensor([10, 0, 40, 20]), "seed": 0,
        "strength": torch.tensor([30.0, 0.0, 40.0, 50.0], dtype=torch.float64), "error_of": lambda kept: 1.0,
    }  # fmt: skip
    return MixtureView(**{**known, **changes})


def test_scores_follow_their_definitions() -> None:
    assert SCORES["reap"].function(view()).tolist() == [3.0, 0.0, 1.0, 2.5]
    assert view().best(SCORES["frequency"].function(view())) == [2, 3]
    assert view(groups=2).best(SCORES["frequency"].function(view())) == [0, 2]


def test_coordinated_finds_the_best_set_by_exchanges() -> None:
    worth = {frozenset({0, 1}): 0.1, frozenset({0, 3}): 0.9, frozenset({1, 3}): 0.5}
    score: Tensor = SCORES["coordinated"].function(
        view(error_of=lambda kept: worth.get(frozenset(kept), 0.8))
    )
    assert view().best(score) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": 1}, "routing needs 2 or more"),
        ({"experts": 0.99}, "routing needs 2 or more"),
        ({"experts": 4}, "removes none of 4 experts"),
        ({"expert_score": "reep"}, "did you mean 'reap'"),
        ({"expert_options": {"trials": 1}, "expert_score": "reap"}, "no options"),
        (
            {"sparsity": 0.5, "exclude": ["*.q_porj"]},
            r"exclude '\*.q_porj' matches no matrix",
        ),
    ],
)
def test_what_cannot_be_removed_is_refused_before_the_work(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        removed(
            save_tiny(mixtral(), None, tmp_path / "dense"),
            tmp_path / "small",
            **changes,
        )
    assert not [*tmp_path.glob("small*")]


def test_a_model_without_mixtures_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no mixture of experts"):
        removed(llama, tmp_path / "small")
    for model, more in (
        (tiny_llama(), {}),
        (str(llama), {"out": tmp_path / "o", "trust_remote_code": True}),
    ):
        with pytest.raises(
            RecipeError,
            match="takes a model by name, and out=DIR, without teacher or trust",
        ):
            sparsellm.prune(model, Recipe(**RECIPE), calibration=IDS, **more)
    for setting in ({"expert_score": "reap"}, {"expert_options": {"trials": 1}}):
        with pytest.raises(RecipeError, match="give experts, or leave them out"):
            sparsellm.prune(tiny_llama(), Recipe(**setting), calibration=IDS)


def test_a_checkpoint_of_the_user_is_not_taken_for_the_smaller_model(
    tmp_path: Path,
) -> None:
    source = save_tiny(mixtral(), None, tmp_path / "dense")
    removed(source, tmp_path / "small-experts", experts=3)
    before = tree(tmp_path / "small-experts")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="small-experts"):
            sparsellm.prune(
                source,
                Recipe(**RECIPE),
                out=tmp_path / "small",
                calibration=IDS,
                overwrite=overwrite,
            )
    assert tree(tmp_path / "small-experts") == before
