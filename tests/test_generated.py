"""A few of the generated inputs of each command; ``python -m tests.generated`` runs a thousand."""

from __future__ import annotations

import pytest

from tests.generated import COMMANDS, alone, outcome


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_inputs_end_in_a_line_and_destroy_nothing(name: str) -> None:
    with alone():
        ends = {number: outcome(name, number) for number in range(8)}
    assert all(end in ("refused", "succeeded") for end, _ in ends.values()), ends
