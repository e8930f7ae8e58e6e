"""Three processes against one: equal masks, weights to rounding, the same bits in every process."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsellm import parallel
from sparsellm.app import process
from sparsellm.errors import RecipeError
from sparsellm.model.capture import merged
from tests.method.sweep.helpers import same_bits
from tests.parallel import workers
from tests.parallel.processes import run_in

# The linears of GPT-2 have inputs of their own, so that a method that prunes them in order never has two at a time.
ONE_BY_ONE = ("sparsellm biases",)


@pytest.fixture(scope="module", params=[3])
def outputs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """name → what each process found."""
    size: int = request.param
    folder = tmp_path_factory.mktemp("processes")
    run_in(size, workers.everything, folder)
    return Outputs(folder, size)


@dataclass(frozen=True)
class Outputs:
    folder: Path
    size: int

    def __call__(self, name: str) -> list[Any]:
        files = [
            self.folder / f"{name}-{rank}-of-{self.size}.pt"
            for rank in range(self.size)
        ]
        return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: workers.prune_case(name) for name in workers.CASES}


@pytest.mark.parametrize("name", workers.CASES)
def test_several_processes_prune_as_one_does(
    name: str, outputs: Any, alone: dict[str, Any]
) -> None:
    first, *rest = outputs(name)
    expected = alone[name]
    assert expected["processes"] == 1
    assert first["processes"] == 1 + len(rest)
    assert (
        first["tokens"]
        == expected["tokens"]
        == workers.windows(workers.WINDOWS).numel()
    )
    for weight_name, weight in first["weights"].items():
        reference = expected["weights"][weight_name]
        assert torch.equal(weight == 0, reference == 0), weight_name
        torch.testing.assert_close(weight, reference, rtol=1e-3, atol=2e-5)
    for (linear, zeros, error), (_, true_zeros, true_error) in zip(
        first["linears"], expected["linears"], strict=True
    ):
        assert zeros == true_zeros, linear
        assert error == pytest.approx(true_error, rel=1e-3), linear
    assert first["allocation"] == expected["allocation"]
    for some, reference in zip(first["sweeps"], expected["sweeps"], strict=True):
        assert some == pytest.approx(reference, rel=1e-3)
    pruned = [process["pruned"] for process in (first, *rest)]
    assert sum(pruned) == expected["pruned"]  # each linear in one process
    if name not in ONE_BY_ONE:
        assert min(pruned) > 0
    for other in rest:
        assert same_bits(first["weights"], other["weights"])
        assert all(
            other[key] == first[key] for key in ("linears", "allocation", "sweeps")
        )


@pytest.mark.parametrize("count", [workers.WINDOWS, 2])
def test_the_survey_divides_its_windows(count: int, outputs: Any) -> None:
    first, *rest = outputs(f"survey {count}")
    divided, single = first
    assert divided["output_squares"].keys() == single["output_squares"].keys()
    for name, value in divided["output_squares"].items():
        torch.testing.assert_close(
            value, single["output_squares"][name], rtol=1e-3, atol=1e-9
        )
    for name, counts in divided["saliency"].items():
        expected = single["saliency"][name]
        assert counts.sum() == expected.sum()
        # some are near an edge
        assert (
            counts.cumsum(0) - expected.cumsum(0)
        ).abs().max() <= 0.02 * counts.sum()
    for other, _ in rest:
        assert all(
            same_bits(divided[key], other[key])
            for key in ("output_squares", "saliency")
        )


def test_an_evaluation_divides_its_windows(outputs: Any) -> None:
    results = outputs("evaluated")
    assert all(count == -(-workers.WINDOWS // len(results)) for count, *_ in results)
    assert all(divided == single == results[0][1] for _, divided, single in results)


def test_the_runs_of_a_comparison_are_divided(outputs: Any) -> None:
    (divided, alone), *rest = outputs("compared")
    assert all(others == divided for others, _ in rest)
    assert [cell.name for cell in divided] == [cell.name for cell in alone]
    for cell, single in zip(divided, alone, strict=True):
        assert cell.kl == pytest.approx(single.kl, rel=1e-3)


def test_what_is_compared_is_there(alone: dict[str, Any]) -> None:
    assert len({zeros for _, zeros, _ in alone["allocated"]["linears"]}) > 1
    assert len(alone["swept"]["sweeps"]) == 4
    # so it is the swept weights that are kept
    assert alone["swept"]["sweeps"][-1][0] < alone["swept"]["sweeps"][0][0]


def test_every_process_holds_the_same_moments(outputs: Any) -> None:
    first, *rest = outputs("gram")
    assert all(torch.equal(first, other) for other in rest)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_same_number_of_processes_gives_the_same_bits(
    size: int, tmp_path: Path
) -> None:
    run_in(size, workers.prune_twice, tmp_path)
    saved = Outputs(tmp_path, size)
    for name in workers.repeated(size):
        first, *others = itertools.chain(*saved(name))
        assert len(others) == 2 * size - 1
        assert all(same_bits(first, other) for other in others), name


def test_all_processes_get_the_solution_of_the_owner(outputs: Any) -> None:
    first, *rest = outputs("unknown")
    assert all(same_bits(first, other) for other in rest)
    weight = first["model.layers.0.mlp.up_proj.weight"]
    assert int((weight == 0).sum()) == round(0.5 * weight.numel())


def test_groups_seen_by_any_process_hold_for_all() -> None:
    assert merged([[["q", "k"], ["o"]], [["q", "k"], ["o"]]]) == [["q", "k"], ["o"]]
    # one meets expert 1 only after its first batch, and so sees its linears apart; one never meets expert 2
    groups = [["q"], ["1.up", "1.gate"], ["2.up", "2.gate"]]
    assert merged([[["q"], ["1.up"], ["1.gate"]], groups]) == groups
    assert merged([[["1.up", "1.gate"]], [["1.up"], ["1.gate"]]]) == [
        ["1.up", "1.gate"]
    ]


def test_shares_are_disjoint_even_and_of_whole_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shares(total: int, unit: int, size: int) -> list[tuple[int, int]]:
        monkeypatch.setattr(parallel, "size", lambda: size)
        parts = []
        for rank in range(size):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            parts.append(parallel.own_slice(total, unit))
        return [(part.start, part.stop) for part in parts]

    for size, total in itertools.product((1, 3, 4), (4, 7, 12)):
        parts = shares(total, 1, size)
        assert [place for part in parts for place in range(*part)] == list(range(total))
        assert (
            max(stop - start for start, stop in parts)
            - min(stop - start for start, stop in parts)
            <= 1
        )
    assert shares(7, 2, 2) == [(0, 4), (4, 7)]
    assert shares(7, 2, 4) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    # two units, four processes
    assert shares(7, 4, 4) == [
        (0, 1),
        (1, 3),
        (3, 5),
        (5, 7),
    ]


def test_each_process_takes_the_gpu_with_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parallel.own_device("cuda") == "cuda"  # one process: whatever the user says
    assert parallel.own_device("cuda:1") == "cuda:1"
    chosen: list[int] = []
    monkeypatch.setattr(parallel, "size", lambda: 4)
    monkeypatch.setattr(parallel, "rank", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.own_device("cuda") == parallel.own_device("auto") == "cuda:1"
    assert chosen == [1, 1]
    assert parallel.own_device("cpu") == "cpu"
    with pytest.raises(RecipeError, match="'cuda:0' is one GPU, and 4 processes"):
        parallel.own_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        RecipeError, match="process 2 of this machine has no GPU: there are 2"
    ):
        parallel.own_device("cuda")


def test_a_shell_with_some_variables_of_torchrun_is_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    monkeypatch.setattr("os.environ", common)
    assert process.count() == 1
    common |= {"RANK": "0", "WORLD_SIZE": "x"}
    assert process.count() == 1
    common["WORLD_SIZE"] = "2"
    assert process.count() == 2


@pytest.fixture
def two_with_a_count(monkeypatch: pytest.MonkeyPatch) -> Any:
    store = torch.distributed.HashStore()
    for name, value in {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "_failures", store)
    return store


def test_who_keeps_the_count_of_failures_ends_after_the_others_asked(
    two_with_a_count: Any,
) -> None:
    assert parallel.claims_failure(alone=True)
    second = threading.Timer(0.3, lambda: two_with_a_count.add("count", 1))
    second.start()
    parallel.await_other_failures()
    assert two_with_a_count.add("count", 0) == 2
    second.join()
    assert not parallel.claims_failure(alone=True)


def test_it_does_not_wait_for_ever(
    two_with_a_count: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "LAST_WORDS", 0.1)
    assert parallel.claims_failure(alone=True)
    parallel.await_other_failures()
    assert two_with_a_count.add("count", 0) == 1
