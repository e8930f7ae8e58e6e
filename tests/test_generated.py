"""A few of the generated inputs of each command; ``python -m tests.generated`` runs a thousand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.generated import COMMANDS, alone, outcome


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    with alone():
        yield


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_inputs_end_in_a_line_and_destroy_nothing(name: str) -> None:
    ends = {number: outcome(name, number) for number in range(8)}
    assert all(end in ("refused", "succeeded") for end, _ in ends.values()), ends
