"""The backward sweep, block by block, against plain autograd of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparsellm import Recipe, prune
from sparsellm.chain import Chain, Feed, LinearView, open_chain
from sparsellm.errors import DataError, ModelError, NumericalError
from sparsellm.run.memory import gradient_bytes
from sparsellm.statistics import GramAccumulator
from sparsellm.storage.scratch import Scratch
from sparsellm.sweep import gradients, head
from sparsellm.sweep.gradients import OutputSquares, Visitor, backward_sweep
from sparsellm.sweep.saliency import loss_gradients
from tests.allocation.helpers import Record, sizes_of, windows
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer

Family = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")


@pytest.fixture(params=[tiny_llama, tiny_opt, tiny_gpt2], ids=lambda family: family.__name__)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def squares(chain: Chain, batch_tokens: int = 2048, names: list[str] | None = None) -> dict[str, Tensor]:
    chosen = names if names is not None else [linear.name for linear in sizes_of(chain)]
    return loss_gradients(Feed(chain, windows(), batch_tokens), chosen).output_squares


class Everything(Visitor):
    def __init__(self) -> None:
        self.entering: dict[str, list[Tensor]] = {}
        self.gradient: dict[str, list[Tensor]] = {}
        self.hidden: dict[int, list[Tensor]] = {}
        self.boundaries: dict[int, list[Tensor]] = {}
        self.blocks: list[int] = []

    def linear(self, index: int, linear: LinearView, entering: Tensor, gradient: Tensor) -> None:
        self.entering.setdefault(linear.name, []).append(entering.flatten(0, -2).clone())
        self.gradient.setdefault(linear.name, []).append(gradient.flatten(0, -2).clone())

    def boundary(self, index: int, hidden: Tensor, gradient: Tensor) -> None:
        self.hidden.setdefault(index, []).append(hidden.clone())
        self.boundaries.setdefault(index, []).append(gradient.clone())

    def block(self, index: int, linears: list[LinearView]) -> None:
        self.blocks.append(index)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("head_tokens", [256, 7])
def test_every_gradient_is_that_of_the_whole_model(
    family: Family, lazy: bool, head_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "HEAD_TOKENS", head_tokens)  # several chunks of a window, the last one shorter
    model = family()
    source = save_tiny(model, tiny_tokenizer(), tmp_path / "m") if lazy else model
    chain = open_chain(source, device=CPU)
    names = [linear.name for linear in sizes_of(chain)]
    record = Record(model, windows(), names)
    seen = Everything()
    scratch = Scratch(4000, tmp_path) if lazy else Scratch()  # most of it on disk
    loss = backward_sweep(Feed(chain, windows(), 45, scratch), seen)
    assert loss == pytest.approx(float(record.loss.detach()) / (6 * 19), rel=1e-5)
    assert seen.blocks == list(reversed(range(len(chain))))
    assert seen.gradient.keys() == set(names)
    for name in names:
        torch.testing.assert_close(torch.cat(seen.entering[name]), record.entering[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat(seen.gradient[name]), record.gradient[name], rtol=1e-3, atol=1e-6)
    assert seen.boundaries.keys() == set(range(len(chain) + 1))
    for index, (gradient, hidden) in enumerate(zip(record.boundaries, record.hidden, strict=True)):
        torch.testing.assert_close(torch.cat(seen.boundaries[index]), gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(torch.cat(seen.hidden[index]), hidden, rtol=1e-4, atol=1e-5)


def test_a_share_of_the_positions_is_scored_and_their_gradients_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "LEAST_SCORED", 1)
    chain, seen, whole = open_chain(tiny_llama(), device=CPU), Everything(), Everything()
    loss = backward_sweep(Feed(chain, windows(), 45), seen, share=0.4)
    assert abs(loss - backward_sweep(Feed(chain, windows(), 45), whole)) < 1  # an estimate of the same
    drawn = []
    for some, all_of_it in zip(seen.boundaries[len(chain)], whole.boundaries[len(chain)], strict=True):
        scored = some.abs().sum(dim=(0, 2)) > 0
        assert int(scored.sum()) == 8  # of 19
        torch.testing.assert_close(some[:, scored], all_of_it[:, scored] * (19 / 8) ** 0.5, rtol=1e-4, atol=1e-7)
        drawn.append(scored.tolist())
    assert drawn[0] != drawn[1]


def test_squares_keep_their_expectation_where_few_positions_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens are what an untrained model predicts, so errors at different positions are uncorrelated."""
    monkeypatch.setattr(gradients, "LEAST_SCORED", 1)
    feed, sums = Feed(open_chain(tiny_llama(), device=CPU), windows(64), 2048), []
    for share in (0.25, 1.0):
        seen = OutputSquares(feed.windows.numel())
        backward_sweep(feed, seen, share=share)
        sums.append(torch.stack([mean.sum() for mean in seen.means().values()]))
    assert 0.8 < float((sums[0] / sums[1]).median()) < 1.25  # 0.25 or 4 with another scale


def test_short_windows_are_scored_whole() -> None:
    whole = gradients._positions(gradients.LEAST_SCORED, 0.01, seed=0)
    assert whole.tolist() == list(range(gradients.LEAST_SCORED))
    some = gradients._positions(1000, 0.25, seed=0)
    assert some.tolist() == sorted(set(some.tolist()))
    assert (len(some), int(some.max()) < 1000) == (250, True)
    assert torch.equal(some, gradients._positions(1000, 0.25, seed=0))


def test_what_it_keeps_is_known_before_it_runs(family: Family) -> None:
    class Counting(Scratch):
        held = most = 0

        def take(self, size: int) -> bool:
            self.held += size
            self.most = max(self.most, self.held)
            return True

        def give_back(self, size: int) -> None:
            self.held -= size

    chain, scratch = open_chain(family(), device=CPU), Counting()
    backward_sweep(Feed(chain, windows(), 45, scratch), Visitor())
    assert scratch.most == gradient_bytes(chain, windows().numel())
    assert scratch.held == 0


def test_only_the_named_linears_are_shown_and_squares_are_means_over_tokens(family: Family) -> None:
    model = family()
    chain = open_chain(model, device=CPU)
    names = [linear.name for linear in sizes_of(chain)][1::3]
    record = Record(model, windows(), names)
    found = squares(chain, 40, names)
    assert found.keys() == set(names)
    for name in names:
        torch.testing.assert_close(found[name], record.gradient[name].square().mean(0), rtol=1e-3, atol=1e-9)


def test_a_visitor_may_take_second_moments_at_the_writers_of_the_residual_stream() -> None:
    model = tiny_llama()
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn.o_proj", "mlp.down_proj")]

    class Moments(Visitor):
        def __init__(self) -> None:
            self.of = {name: GramAccumulator(32) for name in names}

        def linear(self, index: int, linear: LinearView, entering: Tensor, gradient: Tensor) -> None:
            self.of[linear.name].update(gradient)

    seen = Moments()
    backward_sweep(Feed(open_chain(model, device=CPU), windows(), 2048), seen, names)
    record = Record(model, windows(), names)
    for name in names:
        g = record.gradient[name]
        torch.testing.assert_close(seen.of[name].finish().matrix, g.T @ g / len(g), rtol=1e-3, atol=1e-7)


def test_half_precision_is_swept_in_fp32() -> None:
    model = tiny_llama().to(torch.bfloat16)
    chain = open_chain(model, device=CPU)
    names = [linear.name for linear in sizes_of(chain)]
    found = squares(chain, 40)
    record = Record(model.float(), windows(), names)  # the same weights; only hidden states were rounded on their way
    for name in names:
        assert found[name].dtype == torch.float32
        expected = record.gradient[name].square().mean(0)
        assert float((found[name] - expected).norm() / expected.norm()) < 0.05


def test_an_input_that_is_changed_in_place_afterwards_is_refused() -> None:
    model = tiny_opt()

    layer = model.model.decoder.layers[0]
    given: list[Tensor] = []
    layer.fc1.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))

    def spoil(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        given[-1].mul_(2)

    layer.fc2.register_forward_hook(spoil)
    with pytest.raises(ModelError, match="fc1"):
        backward_sweep(Feed(open_chain(model, device=CPU), windows(), 2048), Everything())
    assert squares(open_chain(model, device=CPU))  # of outputs alone it is no matter


def test_gradients_that_are_not_finite_are_named() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return gradient[0] * torch.nan

    model = tiny_llama()
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: Broken.apply(output))
    recipe = Recipe(sparsity=0.5, effort=0)
    for asking in (recipe, recipe.updated(allocation="uniform")):
        with pytest.raises(NumericalError, match=r"gradients at model\.layers\.1\..* not finite; .* do without"):
            prune(model, asking, calibration=windows())


def test_an_output_that_no_token_was_routed_to_is_not_known() -> None:
    chain = open_chain(tiny_llama(), device=CPU)
    linear, other = chain.linears(0)[:2]
    seen = OutputSquares(6)
    seen.linear(0, linear, torch.zeros(0, linear.in_features), torch.zeros(0, linear.out_features))
    seen.linear(0, other, torch.zeros(3, other.in_features), torch.full((3, other.out_features), 2.0))
    found = seen.means()
    assert found.keys() == {other.name}
    assert torch.equal(found[other.name], torch.full((other.out_features,), 2.0))


def changing(inplace: bool) -> PreTrainedModel:
    """Every block doubles its input first."""

    class Doubling(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
            return super().forward(hidden_states.mul_(2) if inplace else hidden_states * 2, **call)

    model = tiny_llama()
    for layer in model.model.layers:
        layer.__class__ = Doubling
    return model


def test_a_block_may_change_in_place_what_it_is_given() -> None:
    """It runs several times on what enters it, and gradients are of what entered."""
    changed, copied = (squares(open_chain(changing(inplace), device=CPU), 40) for inplace in (True, False))
    assert all(torch.equal(changed[name], copied[name]) for name in copied)
    one, other = changing(True), changing(False)
    for model in (one, other):
        prune(model, Recipe(sparsity=0.5, passes=1), calibration=windows())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_block_without_a_gradient_is_named_and_needs_none_where_nobody_asks() -> None:
    class Closed(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
            with torch.no_grad():
                return super().forward(hidden_states, **call)

    model = tiny_llama()
    model.model.layers[1].__class__ = Closed
    recipe = Recipe(sparsity=0.5, effort=0)
    advice = r"model\.layers\.1 has no gradient .*; do without: take allocation uniform and, in sparsellm, effort 0 and"
    for asking in (recipe, recipe.updated(allocation="uniform"), recipe.updated(options={"output_metric": 0})):
        with pytest.raises(ModelError, match=advice):
            prune(model, asking, calibration=windows())
    asking = recipe.updated(allocation="uniform", effort=0, options={"output_metric": 0})
    assert prune(model, asking, calibration=windows()).sparsity > 0.49
    assert prune(model, Recipe(pattern="2:4", effort=0), calibration=windows()).sparsity > 0.49


def test_windows_without_a_next_token_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(3, 1\)"):
        backward_sweep(Feed(open_chain(tiny_opt(), device=CPU), windows(3, 1), 2048), Visitor())
