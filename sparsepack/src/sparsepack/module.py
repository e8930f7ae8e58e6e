"""A linear layer whose weight stays packed, and the product of activations with a packed weight.

A batch of up to 16 tokens is multiplied by a kernel that reads packed weights, if the device has one. Such a batch is
bound by memory, so fewer bytes make it faster. A larger batch is bound by arithmetic: the weight is unpacked tile by
tile, all tokens use a tile while it is in the cache, and no dense weight is held. Without a compiled kernel every batch
takes tiles. Tiles are in the dtype of the inputs, and kernels may round inputs to int8. Where the processor multiplies
bf16 itself, kernels decode and multiply the tiles, and begin with 10 tokens if it has AMX.

The order of sums may change after 16 tokens, and for bf16 on a CPU after 9 and 32.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsepack.codes import FLOAT_TYPES, TYPE_OF
from sparsepack.errors import FormatError, PackError, SettingError
from sparsepack.layout import FIELDS, PackedWeight, as_bitmask, unpack, unpack_rows
from sparsepack.validation import PACK_AGAIN, validate

SMALL_BATCH = 16  # tokens; the limit of the kernels on packed weights
# weights in a tile; a larger one leaves the cache before it is used, a smaller one slows the product
TILE = 1 << 20
ROWS = 64  # the rows of a tile are a multiple of this, for blocked products
# bf16 tokens on a CPU up to which a tile is the left factor: the library rearranges the right one, the smaller then
FEW_TOKENS = 32
FEW_TILE = 1 << 19  # weights in a tile for so few tokens
LARGE_PAGES = 1 << 22  # bytes from which on weights are gathered: two large pages

# what kernels multiply whole numbers by; the first is the default
ACTIVATIONS = (
    "int8",
    "fp32",
)
PACKED_BUFFERS = tuple(f"weight_{field}" for field in FIELDS)


def multiply(packed: PackedWeight, x: Tensor, rounded: bool = False) -> Tensor:
    """``x Wᵀ`` for ``x (tokens, in)`` on the weight's device: ``(tokens, out)`` in the type of ``x``, summed in fp32.

    The weight is a bitmask or dense, and passed ``sparsepack.validation.validate``. ``rounded``: whether the kernel
    may round a small batch to int8, where the weight is int8 or int4."""
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.sparsepack.multiply(x, *_parts_of(packed), rounded)
        return product
    return _multiply(packed, x, rounded)


def _multiply(packed: PackedWeight, x: Tensor, rounded: bool) -> Tensor:
    """The product of ``multiply``, which ``torch.compile`` cannot look into."""
    device = x.device.type
    kernels = None
    if x.dtype in FLOAT_TYPES.values():
        kernels = _kernels(device)
    if kernels is not None and _takes_tiles(kernels, packed, x):
        tiled: Tensor = kernels.multiply_tiles(packed, x)
        return tiled
    if kernels is not None and 0 < len(x) <= SMALL_BATCH:
        options = {}
        if rounded and device == "cpu":
            options["rounded"] = True
        product: Tensor = kernels.multiply(packed, x.contiguous(), **options)
        return product
    return _multiply_tiled(packed, x, getattr(kernels, "unpack_rows", None))


def _takes_tiles(kernels: Any, packed: PackedWeight, x: Tensor) -> bool:
    """Whether the kernels' own tiles are the fastest way to a product."""
    if not x.is_cpu or x.dtype != torch.bfloat16:
        return False
    least = kernels.least_tokens(packed)
    return least is not None and least <= len(x)


def activations_of(name: str | None = None) -> str:
    """``int8`` or ``fp32``: a name that was given, else ``SPARSELLM_ACTIVATIONS`` in the environment, else int8."""
    source = "activations"
    asked = name
    if asked is None:
        source = "SPARSELLM_ACTIVATIONS"
        asked = os.environ.get(source, "").strip()
    if asked and asked not in ACTIVATIONS:
        raise SettingError(
            f"{source}: {asked!r:.100} is unknown; choose one of {', '.join(ACTIVATIONS)}"
        )
    return asked or ACTIVATIONS[0]


def gather(model: nn.Module, *, dense: bool = False) -> None:
    """Moves masks and values of all packed layers on the CPU, with ``dense`` all other weights too, into one block, in
    large pages where there are any.

    Products stream through them: with pages of 4 KB, a seventh of the time of a token goes to the pages' addresses."""
    places: dict[int, list[Tensor]] = {}
    for module in model.modules():
        names: tuple[str, ...] = ()
        if isinstance(module, PackedLinear):
            names = ("weight_mask", "weight_values")
        elif dense:
            names = ("weight",)
        for name in names:
            tensor = getattr(module, name, None)
            if (
                tensor is not None
                and tensor.dim()
                and tensor.is_cpu
                and tensor.is_contiguous()
                and tensor.numel()
            ):
                places.setdefault(tensor.data_ptr(), []).append(tensor)
    sizes = [-(-users[0].nbytes // 64) * 64 for users in places.values()]
    if sum(sizes) < LARGE_PAGES:
        return
    block = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    _ask_for_large_pages(block)
    for users, piece in zip(places.values(), block.split(sizes), strict=True):
        tensor = users[0].detach()
        # A storage of its own: with a view of the block, pickle and torch.save would write the whole block.
        moved = torch.frombuffer(
            piece.numpy(), dtype=tensor.dtype, count=tensor.numel()
        ).view(tensor.shape)
        moved.copy_(tensor)
        for user in users:  # the old memory is freed when all have moved: no second copy of the model is held
            user.data = moved
        del tensor


def _ask_for_large_pages(block: Tensor) -> None:
    """``madvise(MADV_HUGEPAGE)`` of Linux; where it is refused or unknown, pages are as small as before."""
    if sys.platform != "linux":
        return
    first = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = block.data_ptr() + block.numel() - first
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE
    )


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Uses this number of CPU threads inside the context, then restores the previous one; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kernel_name(device: str = "cpu") -> str:
    """The instruction set of the kernel for small batches on this machine, or ``torch`` if there is no kernel."""
    kernels = _kernels(device)
    if kernels is None:
        return "torch"
    return str(kernels.available())


@cache
def _kernels(device: str) -> ModuleType | None:
    """The compiled kernels for a kind of device, if they were built and this machine can run them."""
    name = {"cpu": "native", "cuda": "triton_kernels"}.get(device)
    if name is None:
        return None
    try:
        module = importlib.import_module(f"sparsepack.{name}")
    except ImportError:  # no Triton for this platform
        return None
    if not module.available():
        return None
    return module


def _multiply_tiled(
    packed: PackedWeight, x: Tensor, unpack_tile: Callable[..., Any] | None
) -> Tensor:
    """The product of ``multiply``, from one dense tile of rows after another, by torch."""
    out, columns = packed.shape
    few = len(x) <= FEW_TOKENS and x.dtype == torch.bfloat16 and x.is_cpu
    weights = FEW_TILE if few else TILE
    rows = max(1, min(out, weights // columns))
    if rows > ROWS:
        rows -= rows % ROWS
    y = x.new_empty(len(x), out)
    buffer = x.new_empty(rows, columns)
    for first in range(0, out, rows):
        last = min(first + rows, out)
        if unpack_tile is None:
            tile = unpack_rows(packed, first, last, x.dtype)
        else:
            tile = buffer[: last - first]
            unpack_tile(packed, first, last, tile)
        if few:
            y[:, first:last] = torch.mm(tile, x.t()).t()
        else:
            # a copy from a separate result costs a tenth of a short prompt
            torch.mm(x, tile.t(), out=y[:, first:last])
    return y


def _assemble(
    parts: Sequence[Tensor | None], columns: int, name: str = "weight"
) -> PackedWeight:
    """The packed weight of the tensors of ``FIELDS``; one mask for several rows is that of the layout ``dense``.

    A FormatError says that the values have a type that the format does not have."""
    mask, values, offsets = (part for part in parts[:3] if part is not None)
    scales, exponents, levels = parts[3:]
    value_type = TYPE_OF.get(values.dtype)
    if value_type is None:
        raise FormatError(
            f"packed weight {name}: values cannot be {values.dtype}; {PACK_AGAIN}"
        )
    shape = (offsets.shape[0] - 1, columns)
    layout = "bitmask"
    if mask.shape[0] == 1 < shape[0]:
        layout = "dense"
    return PackedWeight(
        shape,
        layout,
        mask=mask,
        values=values,
        offsets=offsets,
        scales=scales,
        value_type=value_type,
        exponents=exponents,
        levels=levels,
    )


def _parts_of(packed: PackedWeight) -> list[Tensor | None]:
    """The tensors of ``FIELDS``, as the operators take them."""
    return [getattr(packed, field) for field in FIELDS]


def _dense(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """``sparsepack.layout.unpack``, as an operator where a model is compiled."""
    if torch.compiler.is_compiling():
        columns = packed.shape[1]
        weight: Tensor = torch.ops.sparsepack.unpack(*_parts_of(packed), columns, dtype)
        return weight
    return unpack(packed, dtype)


# torch.compile puts a whole model into one graph, since it knows these operators. A model that is not compiled calls
# the functions themselves, which is faster.
_OPERATORS = torch.library.Library("sparsepack", "FRAGMENT")
_PARTS = "Tensor mask, Tensor values, Tensor offsets, Tensor? scales, Tensor? exponents, Tensor? levels"


def _multiply_operator(x: Tensor, *parts: Any) -> Tensor:
    *tensors, rounded = parts
    return _multiply(_assemble(tensors, x.shape[1]), x, rounded)


def _unpack_operator(*parts: Any) -> Tensor:
    *tensors, columns, dtype = parts
    return unpack(_assemble(tensors, columns), dtype)


def _shape_of_product(x: Tensor, *parts: Any) -> Tensor:
    # not len(x), which would fix the number of tokens for a compiled model
    return x.new_empty(x.shape[0], parts[FIELDS.index("offsets")].shape[0] - 1)


def _shape_of_weight(*parts: Any) -> Tensor:
    *tensors, columns, dtype = parts
    offsets: Tensor = tensors[FIELDS.index("offsets")]
    return offsets.new_empty(offsets.shape[0] - 1, columns, dtype=dtype)


def _register(
    schema: str, function: Callable[..., Tensor], shape: Callable[..., Tensor]
) -> None:
    """Registers an operator: what it computes, and an empty tensor of the shape of its result."""
    name = schema.partition("(")[0]
    _OPERATORS.define(schema)
    _OPERATORS.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsepack::{name}", shape, lib=_OPERATORS)


_register(
    f"multiply(Tensor x, {_PARTS}, bool rounded) -> Tensor",
    _multiply_operator,
    _shape_of_product,
)
_register(
    f"unpack({_PARTS}, int columns, ScalarType dtype) -> Tensor",
    _unpack_operator,
    _shape_of_weight,
)


class PackedLinear(nn.Module):
    """``y = x Wᵀ + b`` with a packed ``W (out, in)``; replaces ``nn.Linear``.

    ``weight`` is a placeholder with one element. It has the dtype and device that other code reads from a linear's
    weight, and its shape makes loaders without support for the format raise an error. The packed weight is in the
    buffers ``PACKED_BUFFERS``. ``.to`` moves them, but a change of dtype converts only the placeholder and the
    bias: values keep the type in which they were packed."""

    weight: Tensor
    weight_mask: Tensor | None
    weight_values: Tensor | None

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
        self.in_features = in_features
        self.out_features = out_features
        self.rounded = activations_of() == "int8"
        # whether the model had a Conv1D here, whose weight is (in, out)
        self.transposed = False
        self.register_buffer("weight", torch.zeros(1, dtype=dtype, device=device))
        for name in PACKED_BUFFERS:
            self.register_buffer(name, None)
        self.bias: nn.Parameter | None = None
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros)

    def set_packed(self, packed: PackedWeight, name: str = "weight") -> None:
        """Checks a packed weight and moves it to the device of the placeholder; N:M codes become a bitmask.

        Raises:
            FormatError: it is inconsistent, or has another shape than this layer.
        """
        self._check(packed, name)
        packed = as_bitmask(packed).to(self.weight.device)
        for name, field in zip(PACKED_BUFFERS, FIELDS, strict=True):
            setattr(self, name, getattr(packed, field))

    def _check(self, packed: PackedWeight, name: str) -> None:
        if packed.shape != (self.out_features, self.in_features):
            raise FormatError(
                f"packed weight {name} has shape {packed.shape}, where the model has "
                f"{(self.out_features, self.in_features)}; config.json and the weight files do not belong together"
            )
        validate(packed, name)

    @property
    def packed(self) -> PackedWeight:
        """The packed weight, without a copy; a PackError if none was loaded."""
        if self.weight_mask is None:
            raise PackError(
                "this PackedLinear has no weight yet; load it with sparsepack.load(DIR)"
            )
        return _assemble(
            [self._buffers[name] for name in PACKED_BUFFERS], self.in_features
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``, in the type of ``x``."""
        flat = x.reshape(-1, self.in_features)
        # the weight is unpacked again for the gradient, and not kept
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = checkpoint(
                lambda x: x @ _dense(self.packed, x.dtype).t(),
                flat,
                use_reentrant=False,
            )
        else:
            y = multiply(self.packed, flat, self.rounded)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def to_dense(self) -> nn.Module:
        """The same layer with a dense weight, in the dtype of the placeholder, which can be trained."""
        weight = unpack(self.packed, self.weight.dtype)
        linear: nn.Module = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                linear = Conv1D(self.out_features, self.in_features)
            weight = weight.t().contiguous()
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training).requires_grad_()

    def extra_repr(self) -> str:
        kept = "no weight"
        if self.weight_mask is not None:
            kept = f"{self.packed.value_type}, {self.packed.nbytes / 1e6:.2f} MB, not trained (sparsellm unpack)"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kept}"

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> PackedLinear:
        # Values, scales and masks move with .to(device) and do not change in .to(dtype), .half() or .type(dtype).
        packed = [self._buffers[name] for name in PACKED_BUFFERS]

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.dtype != tensor.dtype and any(tensor is part for part in packed):
                return tensor.to(new.device)
            return new

        super()._apply(moved, recurse)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        *rest: Any,
    ) -> None:
        """Checks the loaded tensors, and puts them into buffers of other sizes than these: kept values differ in
        number."""
        parts = [state_dict.get(prefix + buffer) for buffer in PACKED_BUFFERS]
        name = prefix.rstrip(".")
        if any(part is not None for part in parts):
            try:
                if any(part is None for part in parts[:3]):
                    raise FormatError(
                        f"packed weight {name}: mask, values and offsets are loaded together"
                    )
                copies = [None if part is None else part.clone() for part in parts]
                self.set_packed(_assemble(copies, self.in_features, name), name)
            except FormatError as error:
                rest[-1].append(str(error))
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)


def row_scale(module: Any) -> float | None:
    """The factor of the rows that an embedding returns: 1 for ``nn.Embedding``, another for those of the Gemma kind;
    None for other modules, and where it is not known.

    Gemma's hold it as a buffer, without a value before the weights are loaded, and newer ones as a number too."""
    if type(module) is nn.Embedding:
        return 1.0
    held = getattr(module, "embed_scale", None)
    if not type(module).__name__.endswith("ScaledWordEmbedding") or not isinstance(
        held, Tensor
    ):
        return None
    number = getattr(module, "scalar_embed_scale", None)
    if number is None and (held.is_meta or held.numel() != 1):
        return None
    return float(held if number is None else number)


class PackedEmbedding(PackedLinear):
    """An embedding whose ``row_scale`` is known, with rows of int8, which may be the output head's too."""

    def __init__(self, embedding: nn.Embedding) -> None:
        rows, columns = embedding.weight.shape
        super().__init__(
            columns,
            rows,
            False,
            dtype=embedding.weight.dtype,
            device=embedding.weight.device,
        )
        # transformers ties parameters alone
        self.weight = nn.Parameter(self.weight, requires_grad=False)
        self.num_embeddings = rows
        self.embedding_dim = columns
        self.padding_idx = embedding.padding_idx
        self.kind: Any = type(embedding)
        scale = row_scale(embedding)
        assert scale is not None
        self.scale = scale

    def _check(self, packed: PackedWeight, name: str) -> None:
        stored = f"{packed.layout}, {packed.narrower or packed.value_type}"
        if packed.exponents is not None:
            stored += " with exponents"
        if packed.narrower is None and packed.group is not None:
            stored += " with scales of columns"
        if stored != "dense, int8":
            raise FormatError(
                f"packed weight {name} is {stored}; an embedding is dense, int8: pack the model again"
            )
        super()._check(packed, name)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of token ids, ``(..., columns)`` in the dtype of the placeholder."""
        packed = self.packed
        assert packed.scales is not None
        # refuses negative ids
        values = nn.functional.embedding(ids, packed.values.view(packed.shape))
        rows = values.float() * packed.scales[ids].unsqueeze(-1)
        rows = rows.to(self.weight.dtype)
        if self.kind is nn.Embedding:
            return rows
        # The factor is rounded to the dtype first, as the dense embedding does.
        return rows * torch.tensor(self.scale).to(rows)

    def to_dense(self) -> nn.Module:
        """The same embedding with a dense weight, in the dtype of the placeholder."""
        weight = unpack(self.packed, self.weight.dtype)
        if self.kind is nn.Embedding:
            embedding: nn.Embedding = nn.Embedding.from_pretrained(
                weight, padding_idx=self.padding_idx
            )
        else:
            with torch.device(weight.device):
                embedding = self.kind(
                    1, self.embedding_dim, None, embed_scale=self.scale
                )
            embedding.weight = nn.Parameter(weight)
            embedding.num_embeddings = self.num_embeddings
            embedding.padding_idx = self.padding_idx
        return embedding.train(self.training).requires_grad_()


def to_dense(model: nn.Module) -> nn.Module:
    """Replaces every packed layer of a model, in place, by a dense one with the same weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedLinear):
                setattr(module, name, child.to_dense())
    # that of transformers: a head may be the embedding's weight
    getattr(model, "tie_weights", lambda: None)()
    return model
