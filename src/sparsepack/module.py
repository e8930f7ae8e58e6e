"""A linear layer whose weight stays packed, and the product of activations with a packed weight.

A batch of up to 16 tokens is multiplied by a kernel that reads packed weights, if the device has one. Such a batch is
bound by memory, so fewer bytes make it faster. A larger batch is bound by arithmetic: the weight is unpacked tile by
tile, all tokens use a tile while it is in the cache, and no dense weight is held. Without a compiled kernel every batch
is multiplied by tiles; the results differ only by the order of summation.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm.errors import KernelError, SparseLLMError, StorageError, nearest
from sparsepack.codes import FLOAT_TYPES, type_of_values
from sparsepack.layout import PackedWeight, as_bitmask, unpack, unpack_rows
from sparsepack.validation import validate

SMALL_BATCH = 16  # tokens; the limit of the kernels on packed weights
TILE = 1 << 20  # weights in a tile; a larger one leaves the cache before it is used, a smaller one slows the product
ROWS = 64  # the rows of a tile are a multiple of this, for blocked products

ACTIVATIONS = ("int8", "fp32")  # what kernels multiply weights of int8 and int4 by; the first is the default
PACKED_BUFFERS = (
    "weight_mask",
    "weight_values",
    "weight_offsets",
    "weight_scales",
    "weight_exponents",
    "weight_levels",
)
_SAME_SIZE = {2: torch.int16, 4: torch.int32}


def multiply(packed: PackedWeight, x: Tensor, rounded: bool = False) -> Tensor:
    """``x Wᵀ`` for ``x (tokens, in)``: ``(tokens, out)`` in the type of ``x``, summed in fp32.

    Args:
        packed: a weight in the layout ``bitmask`` or ``dense`` that passed
            :func:`sparsepack.validation.validate`.
        x: fp32, bf16 or fp16, on the weight's device.
        rounded: whether the kernel may round a small batch to int8, where the weight is int8 or int4.
    """
    kernels = _kernels(x.device.type)
    if kernels is not None and 0 < len(x) <= SMALL_BATCH and x.dtype in FLOAT_TYPES.values():
        options = {"rounded": True} if rounded and x.device.type == "cpu" else {}
        product = kernels.multiply(packed, x.contiguous(), **options)
        assert isinstance(product, Tensor)
        return product
    return _multiply_tiled(packed, x, None if kernels is None else getattr(kernels, "unpack_rows", None))


def activations_of(name: str | None = None) -> str:
    """``int8`` or ``fp32``: a name that was given, else ``SPARSELLM_ACTIVATIONS`` in the environment, else int8.

    Raises:
        KernelError: it is neither.
    """
    asked = os.environ.get("SPARSELLM_ACTIVATIONS", "").strip() if name is None else name
    if asked and asked not in ACTIVATIONS:
        source = "SPARSELLM_ACTIVATIONS" if name is None else "activations"
        raise KernelError(f"{source}: {asked!r:.100} is unknown; {nearest(asked, ACTIVATIONS)}")
    return asked or ACTIVATIONS[0]


def set_activations(model: nn.Module, name: str | None = None) -> None:
    """Sets whether the kernels round activations (:func:`activations_of`) in all packed layers of a model."""
    rounded = activations_of(name) == "int8"
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.rounded = rounded


def gather(model: nn.Module) -> None:
    """Moves masks and values of all packed layers on the CPU into one block, in large pages where there are any.

    Products stream through them: with pages of 4 KB, a seventh of the time of a token goes to the pages' addresses.
    """
    places: dict[int, list[tuple[PackedLinear, str]]] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            for name in ("weight_mask", "weight_values"):
                buffer = getattr(module, name)
                if buffer is not None and buffer.device.type == "cpu" and buffer.numel():
                    places.setdefault(buffer.data_ptr(), []).append((module, name))
    sizes = [-(-getattr(*users[0]).nbytes // 64) * 64 for users in places.values()]
    if sum(sizes) < 1 << 22:  # two large pages
        return
    block = torch.empty(sum(sizes), dtype=torch.uint8)
    _ask_for_large_pages(block)
    for users, piece in zip(places.values(), block.split(sizes), strict=True):
        tensor = getattr(*users[0])  # freed when it has moved: no second copy of the model is held
        moved = piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        moved.copy_(tensor)
        for module, name in users:
            setattr(module, name, moved)


def _ask_for_large_pages(block: Tensor) -> None:
    """``madvise(MADV_HUGEPAGE)`` of Linux; where it is refused or unknown, pages are as small as before."""
    if sys.platform != "linux":
        return
    first = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = block.data_ptr() + block.numel() - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


def kernel_name(device: str = "cpu") -> str:
    """The instruction set of the kernel for small batches on this machine, or ``torch`` if there is no kernel."""
    kernels = _kernels(device)
    return "torch" if kernels is None else str(kernels.available())


@cache
def _kernels(device: str) -> ModuleType | None:
    """The compiled kernels for a kind of device, if they were built and this machine can run them."""
    name = {"cpu": "native", "cuda": "triton_kernels"}.get(device)
    if name is None:
        return None
    try:
        module = importlib.import_module(f"sparsepack.{name}")
    except ImportError:  # built without a compiler, or no Triton for this platform
        return None
    return module if module.available() else None


def _multiply_tiled(packed: PackedWeight, x: Tensor, unpack_tile: Callable[..., Any] | None) -> Tensor:
    out, columns = packed.shape
    rows = max(1, min(out, TILE // columns))
    if rows > ROWS:
        rows -= rows % ROWS
    y = x.new_empty(len(x), out)
    buffer = x.new_empty(rows, columns) if unpack_tile is not None else None
    for first in range(0, out, rows):
        last = min(first + rows, out)
        if unpack_tile is not None:
            assert buffer is not None
            tile = buffer[: last - first]
            unpack_tile(packed, first, last, tile)
        else:
            tile = unpack_rows(packed, first, last, x.dtype)
        torch.mm(x, tile.t(), out=y[:, first:last])  # a copy from a result of its own costs a tenth of a short prompt
    return y


def _assemble(
    columns: int,
    mask: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    exponents: Tensor | None,
    levels: Tensor | None,
) -> PackedWeight:
    """The packed weight of these buffers; a single mask for several rows is that of the layout ``dense``."""
    shape = (offsets.shape[0] - 1, columns)
    layout = "dense" if mask.shape[0] == 1 < shape[0] else "bitmask"
    kind = type_of_values(values.dtype)
    return PackedWeight(shape, layout, mask, values, offsets, scales, kind, exponents=exponents, levels=levels)


@torch.library.custom_op("sparsellm::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    exponents: Tensor | None,
    levels: Tensor | None,
    rounded: bool,
) -> Tensor:
    """:func:`multiply` as an operator for torch.compile and autograd; ``x (tokens, in)``."""
    return multiply(_assemble(x.shape[-1], mask, values, offsets, scales, exponents, levels), x, rounded)


@packed_linear.register_fake
def _(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    exponents: Tensor | None,
    levels: Tensor | None,
    rounded: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], offsets.shape[0] - 1)


@torch.library.custom_op("sparsellm::packed_linear_backward", mutates_args=())
def packed_linear_backward(
    grad: Tensor,
    mask: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    exponents: Tensor | None,
    levels: Tensor | None,
    columns: int,
) -> Tensor:
    """The gradient of the input, ``grad W`` for ``grad (tokens, out)``. An operator, as unpacking cannot be traced."""
    return grad @ unpack(_assemble(columns, mask, values, offsets, scales, exponents, levels), grad.dtype)


@packed_linear_backward.register_fake
def _(
    grad: Tensor,
    mask: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    exponents: Tensor | None,
    levels: Tensor | None,
    columns: int,
) -> Tensor:
    return grad.new_empty(grad.shape[0], columns)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.parts, _ = inputs
    ctx.columns = x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Only the input has a gradient: a packed weight is not trained."""
    return packed_linear_backward(grad, *ctx.parts, ctx.columns), None, None, None, None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_remember)


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b`` with a packed ``W (out, in)``; replaces ``nn.Linear``.

    ``weight`` is a placeholder with one element. It has the dtype and device that other code reads from a linear's
    weight, and its shape makes loaders without support for the format raise an error. The packed weight is in the
    buffers ``weight_mask``, ``weight_values``, ``weight_offsets``, ``weight_scales``, ``weight_exponents`` and
    ``weight_levels``. ``.to`` moves them, but a change of dtype converts only the placeholder and the bias: values keep
    the type in which they were packed.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        bias: whether there is one.
        dtype: of the placeholder and the bias.
        device: of the placeholder and the bias.
    """

    weight: Tensor
    weight_mask: Tensor | None
    weight_values: Tensor | None
    weight_offsets: Tensor | None
    weight_scales: Tensor | None
    weight_exponents: Tensor | None
    weight_levels: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rounded = activations_of() == "int8"
        self.register_buffer("weight", torch.zeros(1, dtype=dtype, device=device))
        for name in PACKED_BUFFERS:
            self.register_buffer(name, None)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        """A layer around a packed weight, on its device.

        Raises:
            StorageError: the packed weight is inconsistent.
        """
        module = cls(packed.shape[1], packed.shape[0], bias is not None, dtype=dtype, device=packed.mask.device)
        module.set_packed(packed)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().to(module.weight), requires_grad=False)
        return module

    def set_packed(self, packed: PackedWeight, name: str = "weight") -> None:
        """Checks a packed weight and moves it to the device of the placeholder; N:M codes become a bitmask.

        Raises:
            StorageError: it is inconsistent, or has another shape than this layer.
        """
        if packed.shape != (self.out_features, self.in_features):
            raise StorageError(
                f"packed weight {name} has shape {packed.shape}, where the model has "
                f"{(self.out_features, self.in_features)}; config.json and the weight files do not belong together"
            )
        validate(packed, name)
        packed = as_bitmask(packed).to(self.weight.device)
        for name in PACKED_BUFFERS:
            setattr(self, name, getattr(packed, name.removeprefix("weight_")))

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, without a copy.

        Raises:
            SparseLLMError: none was loaded.
        """
        if self.weight_mask is None or self.weight_values is None or self.weight_offsets is None:
            raise SparseLLMError("this PackedLinear has no weight yet; load it with sparsellm.load(DIR)")
        more = (self.weight_scales, self.weight_exponents, self.weight_levels)
        parts = (self.weight_mask, self.weight_values, self.weight_offsets, *more)
        return _assemble(self.in_features, *parts)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``, in the type of ``x``."""
        flat = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            parts = [getattr(self, name) for name in PACKED_BUFFERS]
            y: Tensor = packed_linear(flat, *parts, self.rounded)
        else:
            y = multiply(self.packed, flat, self.rounded)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """The same layer with a dense weight, in the dtype of the placeholder."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(unpack(self.packed, self.weight.dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        packed = None if self.weight_values is None else self.packed
        kept = "no weight" if packed is None else f"{packed.value_type}, {packed.nbytes / 1e6:.2f} MB"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # Viewed as integers, values and scales move with .to(device) and do not change in .to(dtype) or .half().
        kinds = {}
        for name in ("weight_values", "weight_scales"):
            buffer = self._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                kinds[name] = buffer.dtype
                self._buffers[name] = buffer.view(_SAME_SIZE[buffer.dtype.itemsize])
        super()._apply(fn, recurse)
        for name, dtype in kinds.items():
            buffer = self._buffers[name]
            assert buffer is not None
            self._buffers[name] = buffer.view(dtype)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Checks the loaded tensors, then resizes the buffers, since each weight has another number of kept values."""
        parts = {name: state_dict[prefix + name] for name in PACKED_BUFFERS if prefix + name in state_dict}
        error_messages = rest[-1]
        if {"weight_mask", "weight_values", "weight_offsets"} <= parts.keys():
            try:
                packed = _assemble(
                    self.in_features,
                    parts["weight_mask"],
                    parts["weight_values"],
                    parts["weight_offsets"],
                    parts.get("weight_scales"),
                    parts.get("weight_exponents"),
                    parts.get("weight_levels"),
                )
                if packed.shape[0] != self.out_features:
                    raise StorageError(f"{prefix}weight has {packed.shape[0]} rows, not {self.out_features}")
                validate(packed, prefix.rstrip("."))
            except StorageError as error:
                error_messages.append(str(error))
                return
            for name in PACKED_BUFFERS:
                part = parts.get(name)
                self._buffers[name] = None if part is None else torch.empty_like(part, device=self.weight.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)


def row_scale(module: Any) -> float | None:
    """The factor of the rows that an embedding returns: 1 for ``nn.Embedding``, another for those of the Gemma kind.

    They hold it as a buffer, and newer ones as a number too; the buffer has no value before the weights are loaded.
    None for other kinds of module, and where the factor is not known.
    """
    if type(module) is nn.Embedding:
        return 1.0
    held = getattr(module, "embed_scale", None)
    if not type(module).__name__.endswith("ScaledWordEmbedding") or not isinstance(held, Tensor):
        return None
    number = getattr(module, "scalar_embed_scale", None)
    if number is None and (held.is_meta or held.numel() != 1):
        return None
    return float(held if number is None else number)


class PackedEmbedding(PackedLinear):
    """``nn.Embedding`` with rows of int8, which may be the weight of the output head as well.

    Args:
        embedding: one of which :func:`row_scale` knows the factor.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        rows, columns = embedding.weight.shape
        super().__init__(columns, rows, False, dtype=embedding.weight.dtype, device=embedding.weight.device)
        self.weight = nn.Parameter(self.weight, requires_grad=False)  # transformers ties parameters alone
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, columns, embedding.padding_idx
        self.kind: Any = type(embedding)
        scale = row_scale(embedding)
        assert scale is not None
        self.scale = scale

    def set_packed(self, packed: PackedWeight, name: str = "weight") -> None:
        """As of a linear.

        Raises:
            StorageError: it is inconsistent, has another shape, or is not dense int8.
        """
        if (packed.layout, packed.value_type, packed.exponents) != ("dense", "int8", None):
            more = "" if packed.exponents is None else " with exponents"
            raise StorageError(
                f"packed weight {name} is {packed.layout}, {packed.value_type}{more}; an embedding is dense, int8: "
                "pack the model again"
            )
        super().set_packed(packed, name)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of token ids, ``(..., columns)`` in the dtype of the placeholder."""
        packed = self.packed
        assert packed.scales is not None
        rows = packed.values.view(packed.shape)[ids].float() * packed.scales[ids].unsqueeze(-1)
        rows = rows.to(self.weight.dtype)
        # A factor of its own is rounded to the dtype first, as the dense embedding does.
        return rows if self.kind is nn.Embedding else rows * torch.tensor(self.scale).to(rows)

    def to_embedding(self) -> nn.Embedding:
        """The same layer with a dense weight, in the dtype of the placeholder."""
        weight = unpack(self.packed, self.weight.dtype)
        if self.kind is nn.Embedding:
            embedding: nn.Embedding = nn.Embedding.from_pretrained(weight, padding_idx=self.padding_idx)
        else:
            with torch.device(weight.device):
                embedding = self.kind(1, self.embedding_dim, None, embed_scale=self.scale)
            embedding.weight = nn.Parameter(weight, requires_grad=False)
            embedding.num_embeddings, embedding.padding_idx = self.num_embeddings, self.padding_idx
        return embedding.train(self.training)


def to_dense(model: nn.Module) -> nn.Module:
    """Replaces every packed layer of a model, in place, by a dense one with the same weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedEmbedding):
                setattr(module, name, child.to_embedding())
            elif isinstance(child, PackedLinear):
                setattr(module, name, child.to_linear())
    tie = getattr(model, "tie_weights", None)  # of transformers: a head may be the embedding's weight
    if tie is not None:
        tie()
    return model
