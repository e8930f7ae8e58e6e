"""Matrix products of fp32 tensors in bf16, for passes that only run blocks.

Processors with bf16 units multiply bf16 factors about twice as fast as fp32 ones, and add up in fp32. A product rounds
its two factors, and its result once. Gram matrices never use this; a solver only if it declares ``narrow``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

# elements of a weight, or of a head's scores: to round the factors of smaller ones saves no time
LEAST = 1 << 16
# A weight may be a router's with at most MOST_EXPERTS outputs and at least INPUTS_OF_EACH inputs for each of them.
MOST_EXPERTS = 512
INPUTS_OF_EACH = 8


class Bf16Products(TorchFunctionMode):
    """As a context, runs linears with fp32 weights and fused attention in bf16, forward and backward, and nothing else.
    The rounded copy of a weight is kept as long as the weight lives and is not changed."""

    def __init__(self) -> None:
        super().__init__()
        self._rounded = WeakIdKeyDictionary()  # weight → (its version, its bf16 copy)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and not kwargs and _fits(args[0], args[1]):
            bias = args[2] if len(args) > 2 else None
            return _Linear.apply(args[0], args[1], bias, self._copy(args[1]))
        # Conv1D of GPT-2
        if (
            func is torch.addmm
            and not kwargs
            and len(args) == 3
            and _fits(args[1], args[2])
        ):
            return _Linear.apply(args[1], args[2].t(), args[0], self._copy(args[2]).t())
        if func is functional.scaled_dot_product_attention and _attention_fits(
            *args, **kwargs
        ):
            narrow = (tensor.to(torch.bfloat16) for tensor in args)
            return func(*narrow, **kwargs).float()
        return func(*args, **kwargs)

    def forget(self) -> None:
        """Drops all copies, where weights were changed without a trace in their versions."""
        self._rounded.clear()

    def _copy(self, weight: Tensor) -> Tensor:
        version, copy = self._rounded.get(weight, (None, None))
        if version != weight._version:
            copy = weight.detach().to(torch.bfloat16)
            self._rounded[weight] = weight._version, copy
        assert isinstance(copy, Tensor)
        return copy


def _fits(x: Any, weight: Any) -> bool:
    if not (
        isinstance(weight, Tensor)
        and weight.dtype is x.dtype is torch.float32
        and weight.numel() >= LEAST
    ):
        return False
    # A weight (out, in) with fewer outputs may be a router's. Models run routers in fp32: rounded, they send 3 % of the
    # tokens to other experts, and their products are small.
    return not weight.is_meta and (
        len(weight) > MOST_EXPERTS or INPUTS_OF_EACH * len(weight) > weight.shape[1]
    )


def _attention_fits(*inputs: Any, attn_mask: Tensor | None = None, **_: Any) -> bool:
    """Whether attention is in fp32, large enough and fused. In a mask's numbers bf16 would round distances."""
    if len(inputs) != 3 or (
        attn_mask is not None and attn_mask.dtype is not torch.bool
    ):
        return False
    large = bool(inputs[0].shape[-2] * inputs[1].shape[-2] >= LEAST)
    return (
        inputs[0].dtype is torch.float32 and large and not _is_plain(inputs[0].device)
    )


class _Linear(torch.autograd.Function):
    """``Y = X Wᵀ + b`` with all products in bf16; inputs and results are fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor
    ) -> Tensor:
        narrow = x.to(torch.bfloat16)
        ctx.save_for_backward(narrow, rounded)
        y = functional.linear(narrow, rounded).float()
        if bias is None:
            return y
        return y.add_(bias)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        gradient = gradients[0]
        narrow, rounded = ctx.saved_tensors
        of_y = gradient.to(torch.bfloat16)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        x = None
        weight = None
        bias = None
        if of_x:
            x = (of_y @ rounded).float()
        if of_weight:
            weight = (of_y.flatten(0, -2).t() @ narrow.flatten(0, -2)).float()
        if of_bias:
            bias = gradient.flatten(0, -2).sum(0)
        return x, weight, bias, None


def attention_for(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context for the forward of a pass with gradients. On a GPU attention is then computed as plain products: the
    fused kernels add up its gradients in another order at every run."""
    if _is_plain(device):
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def _is_plain(device: torch.device) -> bool:
    """Whether ``attention_for`` has attention computed as plain products."""
    return device.type == "cuda" and torch.is_grad_enabled()
