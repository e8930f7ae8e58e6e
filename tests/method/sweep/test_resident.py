"""The resident sweep against the streamed one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sparsellm.files.reader import CheckpointReader
from sparsellm.method.sweep.sweep_task import Residence
from tests.files.small import shards_of
from tests.method.sweep import helpers
from tests.method.sweep.helpers import (
    halved,
    linear_weights,
    same_bits,
    sharing_llama,
    swept_by,
    tiny_zamba,
)
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt
from tests.parallel import workers
from tests.parallel.processes import run_in

FAMILIES = (
    tiny_llama,
    tiny_opt,
    tiny_gpt2,
    helpers.tiny_qwen2,
    helpers.tiny_mistral,
    sharing_llama,
    tiny_zamba,
)
WAYS = {
    "whole": Residence(),
    "recomputing": Residence(recomputes=True),
    "sharded": Residence(sharded=True),
    "sharded, recomputing": Residence(sharded=True, recomputes=True),
}


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone, in which it may hold its blocks as several do."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@cache
def streamed(family: helpers.Family) -> Any:
    return swept_by(None, halved(family()), family())


def hooked_llama() -> Any:
    model = tiny_llama()
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: (1.5 * args[0], *args[1:])
    )
    return model


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "family", [hooked_llama, *FAMILIES], ids=lambda family: family.__name__
)
def test_a_resident_sweep_takes_the_steps_of_a_streamed_one(
    family: helpers.Family, way: str
) -> None:
    history, expected = streamed(family)
    model = halved(family())
    zeros = {name: weight == 0 for name, weight in linear_weights(model).items()}
    resident, written = swept_by(WAYS[way], model, family())
    assert history[-1].held_out < history[0].held_out
    for one, other in zip(history, resident, strict=True):
        assert one.held_out == pytest.approx(other.held_out, rel=1e-5)
        assert (one.train or 0.0) == pytest.approx(other.train or 0.0, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(written[name], value, rtol=1e-5, atol=1e-6, msg=name)
    if not WAYS[way].sharded and family not in (sharing_llama, tiny_zamba):
        assert same_bits(written, expected)
    for name, weight in linear_weights(model).items():
        assert torch.equal(weight == 0, zeros[name]), name


def test_ranks_repeat_their_bits_and_go_on_for_each_other(tmp_path: Path) -> None:
    """A sweep saved by one process goes on in two, and one saved by two in one."""
    save_tiny(workers.two_blocks(), None, tmp_path / "model")
    one = workers.swept_to(tmp_path, "one")
    assert workers.swept_to(tmp_path, "begun-by-one", fails=True) is None
    run_in(2, workers.sweep_in_directories, tmp_path)
    last = workers.swept_to(tmp_path, "begun-by-two")
    assert one is not None
    assert one.memory is not None
    assert last is not None
    assert one.memory.sweep == "resident"
    assert one.sweeps[-1].held_out < one.sweeps[0].held_out
    assert last.sweeps[-1].held_out == pytest.approx(one.sweeps[-1].held_out, rel=1e-3)
    # on the windows of one process
    assert last.sweeps[0].held_out == pytest.approx(one.sweeps[0].held_out, rel=0.02)
    assert shards_of(tmp_path / "two") == shards_of(tmp_path / "again")
    expected = CheckpointReader(tmp_path / "one")
    for name in ("two", "begun-by-one", "begun-by-two"):
        reader = CheckpointReader(tmp_path / name)
        for key in expected:
            assert torch.equal(reader.get(key) == 0, expected.get(key) == 0), key
            torch.testing.assert_close(
                reader.get(key),
                expected.get(key),
                rtol=1e-3,
                atol=2e-5,
                msg=f"{key} of {name}",
            )


def test_states_are_judged_as_they_will_be_written(tmp_path: Path) -> None:
    dense = tiny_llama().to(torch.bfloat16).float()
    path = save_tiny(halved(tiny_llama().to(torch.bfloat16)), None, tmp_path / "halved")
    (one, expected), (other, written) = (
        swept_by(way, path, dense, 4, 0.001) for way in (None, Residence())
    )
    assert [record.held_out for record in one] == pytest.approx(
        [record.held_out for record in other], rel=1e-5
    )
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    differing = sum(
        int((written[name] != value).sum()) for name, value in expected.items()
    )
    assert differing < 1e-3 * sum(value.numel() for value in expected.values())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("sharded", [False, True])
def test_blocks_in_bf16_train_fp32_parameters_alike(sharded: bool) -> None:
    """Whole ones round as FSDP2 does, so both lower the divergence of fp32 blocks as far, and keep all zeros."""
    exact, _ = swept_by(Residence(), halved(tiny_opt()), tiny_opt())
    model = halved(tiny_opt())
    zeros = {name: weight == 0 for name, weight in linear_weights(model).items()}
    narrow, written = swept_by(
        Residence(sharded=sharded, narrow=True), model, tiny_opt()
    )
    gains = [history[0].held_out - history[-1].held_out for history in (exact, narrow)]
    assert gains[1] == pytest.approx(gains[0], rel=0.1)
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert all(
        torch.equal(weight == 0, zeros[name])
        for name, weight in linear_weights(model).items()
    )


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("rate", [30.0, 1e30], ids=["absurd", "overflowing"])
@pytest.mark.parametrize(
    "way",
    [None, Residence(), Residence(sharded=True)],
    ids=["streamed", "whole", "sharded"],
)
def test_a_state_that_was_better_at_the_start_is_kept_to_the_bit(
    way: Residence | None, rate: float
) -> None:
    model, dense = halved(tiny_opt()), tiny_opt()
    before = copy.deepcopy(model.state_dict())
    history, _ = swept_by(way, model, dense, rate=rate)
    assert not any(record.held_out < history[0].held_out for record in history)
    assert same_bits(model.state_dict(), before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
