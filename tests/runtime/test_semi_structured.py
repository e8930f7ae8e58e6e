from __future__ import annotations

import warnings

import pytest
import torch

from sparsellm.errors import KernelError
from sparsepack import semi_structured
from sparsepack.semi_structured import to_semi_structured


def _weight() -> torch.Tensor:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    return weight * torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(32)


def test_without_tensor_cores_the_weight_stays_dense_and_says_so_once() -> None:
    semi_structured._tell.cache_clear()
    weight = _weight()
    with pytest.warns(UserWarning, match="NVIDIA GPU"):
        assert to_semi_structured(weight) is weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_semi_structured(weight) is weight


def test_a_weight_that_is_not_two_of_four_is_refused() -> None:
    weight = _weight()
    weight[3, 5] = 1
    for wrong in (weight, weight[:, :-2], weight[0]):
        with pytest.raises(KernelError, match="not 2:4"):
            to_semi_structured(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_tensor_cores_the_product_is_the_dense_one() -> None:
    weight = _weight().half().cuda()
    x = torch.randn(32, 128, generator=torch.Generator().manual_seed(1)).half().cuda()
    sparse = to_semi_structured(weight)
    assert sparse is not weight
    torch.testing.assert_close(torch.nn.functional.linear(x, sparse), torch.nn.functional.linear(x, weight))
