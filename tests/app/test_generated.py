"""Some of the generated inputs of each command."""

from __future__ import annotations

import pytest

from tests.generated import COMMANDS, alone, outcome

GOOD = ("refused", "succeeded")


@pytest.mark.parametrize("many", [8, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_bad_inputs_end_in_a_line_and_destroy_nothing(name: str, many: int) -> None:
    with alone():
        ends = {number: outcome(name, number) for number in range(many)}
    wrong = {number: end for number, end in ends.items() if end[0] not in GOOD}
    assert not wrong
