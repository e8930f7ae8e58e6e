"""The hashes that prove a move: the same for the same model, another for any other, and a difference is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import hashes
from tests.models import tiny_gpt2


def test_a_digest_sees_one_bit_of_any_weight() -> None:
    model = tiny_gpt2()
    before = hashes.digest(model)
    assert hashes.digest(tiny_gpt2()) == before
    with torch.no_grad():
        bias = model.transformer.h[1].mlp.c_fc.bias
        bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
    assert hashes.digest(model) != before


def test_cases_repeat_and_differ_from_each_other() -> None:
    chosen = ["opt/0.6/magnitude", "opt/2:4/magnitude", "gpt2/0.6/sparsellm-paper"]
    result = hashes.hashes(chosen)
    assert result == hashes.hashes(chosen)
    assert len(set(result.values())) == 3
    assert result["gpt2/0.6/sparsellm-paper"] == "refused: ModelError"


def test_a_difference_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_processes(size: int, function: object, folder: Path, only: list[str]) -> None:
        for rank in range(size):
            (folder / f"{rank}.json").write_text('{"a": "1"}')

    monkeypatch.setattr(hashes, "hashes", lambda only: {"a": "1"})
    monkeypatch.setattr(hashes, "run_in", in_processes)
    before = tmp_path / "before.json"
    for kept, code, said in (("1", 0, ""), ("3", 1, "differs: a (2 processes)\n  3\n  1\n")):
        before.write_text(json.dumps({"a (1 process)": "1", "a (2 processes)": kept}))
        monkeypatch.setattr("sys.argv", ["hashes", "--compare", str(before)])
        assert hashes.main() == code
        assert capsys.readouterr() == (said, f"2 hashes compared, {code} differ\n")
