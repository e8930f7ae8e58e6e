"""The hashes that prove a move: the same for the same model, another for any other."""

from __future__ import annotations

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
    chosen = [
        "opt/0.6/magnitude",
        "opt/2:4/magnitude",
        "gpt2/0.6/sparsellm-paper",
        "llama/0.6/sparsellm effort 0",
    ]
    result = hashes.hashes(chosen)
    assert result == hashes.hashes(chosen)
    assert len(set(result.values())) == 4
    assert result["gpt2/0.6/sparsellm-paper"] == "refused: ModelError"
