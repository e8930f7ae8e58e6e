"""The model as a chain: embedding → block 1 → … → block L → norm and head.

Blocks run one at a time, with the arguments that the model's own forward passes to them, which are captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sparsellm.errors import ModelError, SparseLLMError, one_line
from sparsellm.files.reader import open_checkpoint
from sparsellm.model.capture import replacing
from sparsellm.model.experts import STACKED, Mixture
from sparsellm.model.open import check_sizes, config_file, load_config
from sparsellm.model.products import Bf16Products, attention_for
from sparsellm.model.weights import ModelWeights

Forward = Callable[..., object]


@dataclass(frozen=True, eq=False)  # so that a cache takes a call by its identity
class Call:
    """The arguments of a block besides the hidden states, as captured from the model's own forward."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    # the keyword of the hidden states; None if they are the first positional argument
    hidden_keyword: str | None

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with floating-point tensors in another dtype."""
        return self.map(
            lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with ``change`` of every tensor, also of those in tuples, lists and dicts."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Call(args, kwargs, self.hidden_keyword)

    def on(self, layer: Callable[..., Any], hidden: Tensor) -> Any:
        """What ``layer``, a block or its forward, returns for these hidden states."""
        if self.hidden_keyword is None:
            return layer(hidden, *self.args, **self.kwargs)
        return layer(*self.args, **{self.hidden_keyword: hidden}, **self.kwargs)


class Chain(ModelWeights):
    """A decoder-only model, block by block. Build one with ``open_chain``."""

    # the mode in which blocks multiply fp32 matrices in bf16; None for fp32
    products: Bf16Products | None = None
    # hidden states → the return value of a block
    _as_returned: Callable[[Tensor], Any] | None = None
    # what block 0 returned after hidden states; all blocks get it
    _others: tuple[object, ...] = ()

    def mixtures(self, index: int) -> list[Mixture]:
        """The mixtures of block ``index`` whose experts the model stacks."""
        return [
            Mixture(module, name)
            for name, module in self.blocks[index].named_modules()
            if STACKED in vars(module)
        ]

    @torch.no_grad()
    def start(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """The inputs of block 0, ``(batch, seq, hidden)``, and the other arguments of every block, for token ids
        ``(batch, seq)``, from the model's own forward. Embedding and block 0 must be loaded: block 0 runs in the first
        call, which shows the type of its return value, and in every call if it returns more than hidden states. A
        ModelError says that the model's own forward fails, or is not a plain chain of the blocks."""
        if self._others:  # the shapes of the other values may depend on the tokens
            self._as_returned = None
        inputs: list[Tensor] = []
        calls: list[Call] = []

        def record(
            index: int, forward: Forward, /, *args: object, **kwargs: object
        ) -> object:
            hidden, call = _split_call(args, kwargs)
            self._check_next(index, len(calls), hidden, inputs)
            calls.append(call)
            if self._as_returned is None:
                hidden = hidden.clone()  # the block may change its input in place
                output = forward(*args, **kwargs)
                self._as_returned = self._learn_return(output, hidden, index)
            if not inputs:
                inputs.append(hidden)
            return self._as_returned(hidden)

        try:
            with self._intercepted(record):
                self.model.base_model(ids.to(self.device), use_cache=False)
        except (SparseLLMError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # from the model's own code, for example if numbers in the config contradict
            raise ModelError(
                f"the forward of {type(self.model).__name__} fails on token ids of shape {tuple(ids.shape)} "
                f"({one_line(error)}); check its config.json, and that transformers runs it"
            ) from error
        if len(calls) < len(self.blocks):
            raise ModelError(
                f"the forward of {type(self.model).__name__} does not call {self.block_names[len(calls)]}"
            )
        return inputs[0], calls

    @torch.no_grad()
    def check_handed(self, ids: Tensor) -> None:
        """Runs all blocks on token ids ``(batch, seq)``, if they return more than hidden states. Raises ModelError if a
        block reads other values, such as a router's state, that the block before it returned: ``start`` records
        those of block 0 alone, and every later block would get them."""
        if not self._others:
            return
        with self.outer(head=False), self.block(0):
            hidden, calls = self.start(ids)
        others: list[Any] = [*self._others]
        places = {
            id(value): place
            for place, value in enumerate(self._others)
            if isinstance(value, Tensor)
        }
        leaves = tree_leaves([(call.args, call.kwargs) for call in calls[1:]])
        if not any(id(leaf) in places for leaf in leaves):
            return
        for index, call in enumerate(calls):
            now = {key: others[place] for key, place in places.items()}
            real = call.map(lambda value, now=now: now.get(id(value), value))  # type: ignore[misc]
            with self.block(index) as block:
                following, given = _parts_of(real.on(block, hidden.clone()), block)
                other, _ = _parts_of(call.on(block, hidden.clone()), block)
            if not torch.allclose(
                following, other, rtol=1e-3, atol=1e-3, equal_nan=True
            ):
                raise ModelError(
                    f"{self.block_names[index]} reads what the block before it returns besides hidden states; only "
                    "models whose blocks hand on hidden states alone run block by block"
                )
            hidden = following
            others = [*given, *others[len(given) :]]

    def _learn_return(
        self, output: object, hidden: Tensor, index: int
    ) -> Callable[[Tensor], object]:
        """A function that gives hidden states the form of ``output``, which block ``index`` returned for ``hidden``. It
        notes what else is in there."""
        block = self.blocks[index]
        returned, others = _parts_of(output, block)
        if returned.shape != hidden.shape:
            raise ModelError(
                f"{type(block).__name__} changes the shape of its hidden states; this is not a plain chain"
            )
        self._others = others if any(x is not None for x in others) else ()
        if isinstance(output, (tuple, list)):
            make = getattr(output, "_make", tuple)  # how a named tuple is made
            return lambda value: make((value, *others))
        return lambda value: value

    def _check_next(
        self, index: int, called: int, hidden: Tensor, inputs: list[Tensor]
    ) -> None:
        """Refuses a call of block ``index`` after ``called`` others, unless the blocks run once each, in order, and
        each gets what the one before it returned. While arguments are captured, every block returns its input."""
        family = type(self.model).__name__
        if index != called:
            when = "more than once"
            if index > called:
                when = f"before {self.block_names[called]}"
            raise ModelError(
                f"the forward of {family} calls {self.block_names[index]} {when}; only models that call each block "
                "once, in order, are pruned"
            )
        if inputs and hidden is not inputs[0] and not torch.equal(hidden, inputs[0]):
            raise ModelError(
                f"the forward of {family} changes the hidden states between {self.block_names[index - 1]} and "
                f"{self.block_names[index]}; only models whose blocks follow each other directly are pruned"
            )

    def apply(
        self, index: int, hidden: Tensor, call: Call, block: Forward | None = None
    ) -> Tensor:
        """The output of a loaded block, or of a copy ``block`` of it, for hidden states ``(batch, seq, hidden)``."""
        if block is None:
            block = self.blocks[index].forward  # its hooks run in the model's forward
        with self.products or contextlib.nullcontext(), attention_for(self.device):
            kept = hidden.clone()  # a block may change its input in place, and the caller uses the input again
            return _parts_of(call.on(block, kept), self.blocks[index])[0]

    run = torch.no_grad()(apply)  # the same without gradients

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Norm and head, through the model's own forward: logits ``(batch, seq, vocabulary)`` for the output of the
        last block, ``(batch, seq, hidden)``, and its token ids."""

        def replay(
            index: int, forward: Forward, /, *args: object, **kwargs: object
        ) -> object:
            assert self._as_returned is not None, "start() comes before logits()"
            if index == len(self.blocks) - 1:
                return self._as_returned(hidden)
            unchanged, _ = _split_call(args, kwargs)
            return self._as_returned(unchanged)

        # The loss of the routers would need outputs of the blocks, which do not run here.
        without_loss = (
            "output_router_logits" in signature(self.model.forward).parameters
        )
        options = {"output_router_logits": False} if without_loss else {}
        with self._intercepted(replay), self.products or contextlib.nullcontext():
            logits = self.model(ids.to(self.device), use_cache=False, **options).logits
        assert isinstance(logits, Tensor)
        return logits

    finish = torch.no_grad()(logits)  # the same without gradients

    def _intercepted(self, handle: Forward) -> contextlib.AbstractContextManager[None]:
        """Redirects every block's forward to ``handle(index, forward, *args, **kwargs)`` until the context ends. The
        block itself stays in the model, because the forwards of some models read its other attributes."""
        return replacing(
            {
                block: partial(handle, index, block.forward)
                for index, block in enumerate(self.blocks)
            }
        )


def open_chain(
    model: PreTrainedModel | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Chain:
    """A chain over a checkpoint directory (weights read lazily) or over a model in memory, which a walk changes and
    which runs where it is. ``dtype`` is the computing dtype of blocks; None for the fastest that is at least as precise
    as the stored one. A ModelError says that it is not a decoder-only model, or weights do not fit its config; a
    StorageError that the weight files cannot be read."""
    if isinstance(model, PreTrainedModel):
        return Chain(model, None, device=device, dtype=dtype)
    config = load_config(model, trust_remote_code=trust_remote_code)
    reader = open_checkpoint(model)
    check_sizes(config, model / "config.json", reader)
    return Chain(
        empty_model(config, model, trust_remote_code),
        reader,
        device=device,
        dtype=dtype,
    )


def outline(
    place: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Chain:
    """A chain by a config alone, which is that of a checkpoint directory or a JSON file: names, shapes and dtypes as
    for a checkpoint that is read block by block, but no weights, and nothing on the ``device``. Raises ModelError."""
    config = load_config(place, trust_remote_code=trust_remote_code)
    check_sizes(config, place, None)
    chain = Chain(
        empty_model(config, place, trust_remote_code), None, device=device, dtype=dtype
    )
    chain.describe(place, device, dtype, like=chain)
    return chain


def empty_model(
    config: PretrainedConfig, place: Path, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of a config, which is that of a directory or a file, its weights on the meta device."""
    try:
        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
        empty.tie_weights()
    except Exception as error:  # a wrong config raises KeyError, ValueError, RuntimeError, ZeroDivisionError, ...
        raise ModelError(
            f"transformers cannot build the {config.model_type} of {config_file(place)}: {one_line(error)}"
        ) from None
    assert isinstance(empty, PreTrainedModel)
    return empty


def _split_call(
    args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor, Call]:
    """The hidden states, which are the first tensor among a block's arguments, and the other arguments."""
    if args and isinstance(args[0], Tensor):
        return args[0], Call(args[1:], kwargs, None)
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
            return value, Call(args, {k: v for k, v in kwargs.items() if k != key}, key)
    raise ModelError(
        "a block is called without hidden states (batch, seq, hidden); this model is not a plain chain"
    )


def _parts_of(output: object, block: nn.Module) -> tuple[Tensor, tuple[object, ...]]:
    """The hidden states in the return value of a block, and what else it returns."""
    values = output if isinstance(output, (tuple, list)) else (output,)
    if not isinstance(values[0], Tensor):
        raise ModelError(
            f"{type(block).__name__} returns {type(output).__name__}, not hidden states"
        )
    return values[0], tuple(values[1:])
