"""The schema of pruning.json and results.json: what is read, what is refused, and what is kept."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sparsellm.errors import StorageError
from sparsellm.files import results
from sparsellm.files.results import append_result, read_results
from sparsellm.records import Continuation, Pruning, Results, read_record
from tests.report.pages import results as measured

LINEAR: dict[str, Any] = {
    "name": "model.layers.3.mlp.experts.7.w1",
    "shape": [2, 8],
    "zeros": 4,
}
PRUNING: dict[str, Any] = {"sparsity_asked": 0.25, "linears": [LINEAR]}


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        (Pruning, "{", "is not valid JSON"),
        (
            Pruning,
            json.dumps({"linears": []}),
            "sparsity_asked is missing; put the file back as it was",
        ),
        (
            Pruning,
            json.dumps({**PRUNING, "linears": [{**LINEAR, "shape": [2, "8"]}]}),
            "linears.0.shape.1 is '8'",
        ),
        (
            Pruning,
            json.dumps({**PRUNING, "linears": [{**LINEAR, "exponents": "xy"}]}),
            "linears.0.exponents is 'xy'",
        ),
        (Results, json.dumps({"format": 2}), "format is 2"),
        (
            Results,
            json.dumps({"evaluations": [{}]}),
            "evaluations.0.sparsellm is missing",
        ),
        (
            Results,
            json.dumps(measured(math.inf)),
            "evaluations.0.perplexity.value is inf",
        ),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    kind: Any, content: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(StorageError) as caught:
        read_record(kind, path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Fields of another release, such as ``stages``, are not read."""
    one = Pruning.model_validate(
        {**PRUNING, "seconds": {"prune": 1.23456}, "stages": [{"sparsity_pruned": 0.2}]}
    )
    assert (one.zeros, one.weights, one.sparsity_reached) == (4, 16, 0.25)
    assert (one.linears[0].block, one.linears[0].kind) == (3, "mlp.experts.*.w1")
    (tmp_path / "file.json").write_text(one.model_dump_json())
    again = read_record(Pruning, tmp_path / "file.json")
    assert math.isnan(again.linears[0].error)
    assert again.model_dump_json() == one.model_dump_json()
    assert again.seconds == {"prune": 1.235}


def test_fields_of_a_later_release_stay_in_the_results(tmp_path: Path) -> None:
    content = measured(31.4, later=1)
    content["evaluations"][0]["perplexity"]["later"] = 2
    (tmp_path / "results.json").write_text(json.dumps(content))
    append_result(tmp_path, Continuation(prompt="", dense="", pruned=""))
    kept = json.loads((tmp_path / "results.json").read_text())
    assert (kept["later"], kept["evaluations"][0]["perplexity"]["later"]) == (1, 2)


def test_records_appended_at_once_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def read(directory: Path) -> Results:
        content = read_results(directory)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # for the other one, which would read the same
        return content

    monkeypatch.setattr(results, "read_results", read)
    both_records = [
        Continuation(prompt=prompt, dense="", pruned="") for prompt in ("one", "other")
    ]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda record: append_result(tmp_path, record), both_records))
    assert {record.prompt for record in read_results(tmp_path).continuations} == {
        "one",
        "other",
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "25% zeros"),
        (
            {"values": "int8", "bits_per_weight": 4.87},
            "25% zeros, int8, 4.9 bits a weight",
        ),
        ({"linears": [{**LINEAR, "pattern": "1:4"}]}, "25% zeros, 1:4"),
        (
            {
                "linears": [{**LINEAR, "zeros": 0}],
                "values": "int4",
                "grid": "q4_0",
                "bits_per_weight": 4.5,
            },
            "int4 (q4_0), 4.5 bits a weight",
        ),
        (
            {
                "linears": [
                    {**LINEAR, "values": "q4_k"},
                    {**LINEAR, "values": "q6_k"},
                ],
                "sparsity_asked": 0.0,
                "values": "int8",
                "grid": "mixed",
                "bits_per_weight": 5.5,
            },
            "2 types of values, 5.5 bits a weight",
        ),
        (
            {
                "linears": [{**LINEAR, "values": "int4"}, {**LINEAR, "values": "int3"}],
                "values": "mixed",
                "bits_per_weight": 3.5,
            },
            "25% zeros, 2 types of values, 3.5 bits a weight",
        ),
        ({"linears": []}, "no zeros"),
    ],
)
def test_a_title_says_zeros_values_and_bits(changes: dict[str, Any], said: str) -> None:
    run = Pruning.model_validate({**PRUNING, **changes})
    assert run.in_short == said
    assert repr(run) == str(run)
    assert repr(run).startswith(f"<Pruning: {said} in ")
    assert len(repr(run)) < 160


def test_a_sweep_that_gained_nothing_is_said() -> None:
    def with_sweep(*held_out: float) -> Pruning:
        sweeps = [
            {"passes": number, "held_out": value}
            for number, value in enumerate(held_out)
        ]
        return Pruning.model_validate({**PRUNING, "sweeps": sweeps})

    assert with_sweep().idle_sweep == ""
    assert with_sweep(0.2, 0.1, 0.3).idle_sweep == ""
    assert with_sweep(0.2, 0.4, 0.3).idle_sweep == (
        "the sweep gained nothing: the divergence on held-out windows was 0.2 nats a token before it and 0.3 after it, "
        "so the weights before it are kept"
    )
