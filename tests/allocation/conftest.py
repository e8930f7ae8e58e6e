from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from tests.models import tiny_gpt2, tiny_llama, tiny_opt


@pytest.fixture(params=[tiny_llama, tiny_opt, tiny_gpt2], ids=lambda family: family.__name__)
def family(request: pytest.FixtureRequest) -> Callable[..., PreTrainedModel]:
    return request.param
