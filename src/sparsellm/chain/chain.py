"""The model as a chain: embedding → block 1 → … → block L → norm and head.

Blocks run one at a time, with the arguments that the model's own forward passes to them. These arguments are captured,
never guessed, so a release of transformers that adds one does not break the walk. Only one block's weights are in
memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sparsellm.chain.experts import Mixture, gates_of, mixtures_of, separate_experts
from sparsellm.chain.fit import check_sizes
from sparsellm.chain.linears import LinearView, iterate_linears
from sparsellm.chain.names import expert_parts, published_names, tower_names
from sparsellm.chain.open import load_config
from sparsellm.chain.products import Bf16Products, bf16_is_native, bf16_products
from sparsellm.chain.structure import find_blocks
from sparsellm.chain.weights import CheckpointWeights
from sparsellm.errors import ModelError, NumericalError, SparseLLMError, one_line
from sparsellm.storage.reader import WEIGHT_DTYPES, CheckpointReader, not_finite
from sparsellm.storage.shard import TensorSource
from sparsepack.checkpoint import open_checkpoint

SHOWN_TOKENS = 8  # block 0 runs on this many to reveal the type of its return value


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides the hidden states, as captured from the model's own forward."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None  # the keyword of the hidden states; None if they are the first positional argument

    def to(self, dtype: torch.dtype) -> Call:
        """The same call with floating-point tensors in another dtype."""
        return Call(_converted(self.args, dtype), _converted(self.kwargs, dtype), self.hidden_keyword)

    def on(self, block: nn.Module, hidden: Tensor) -> Any:
        if self.hidden_keyword is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.hidden_keyword: hidden}, **self.kwargs)


class Chain:
    """A decoder-only model, block by block. Build one with :func:`open_chain`.

    Attributes:
        model: the transformers model, with experts as separate linears (see :mod:`sparsellm.chain.experts`); weights
            that are not loaded are on the meta device.
        blocks: the decoder blocks, in order.
        block_names: their names in the model.
        device: where blocks run.
        dtype: the dtype in which they compute.
        towers: names of modules of a multimodal model that read no text. They are copied, neither run nor pruned.
        parts: for each weight of an expert that is a part of a tensor of the checkpoint, that part.
        gates: names of weights that choose or scale other modules; they are not pruned.
        products: the mode in which blocks multiply fp32 matrices in bf16; None for products in fp32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: CheckpointReader | None,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        stacked = model.eval().state_dict(keep_vars=True)
        self.model, experts = separate_experts(model)
        model = self.model
        self.device = device
        list_name, blocks = find_blocks(model)
        self.blocks: list[nn.Module] = list(blocks)
        self.block_names = [f"{list_name}.{index}" for index in range(len(blocks))]
        self._canonical = _canonical_names(model)
        self._outer = [name for name in self._all_names() if not name.startswith(f"{list_name}.")]
        self.towers = tower_names(model)
        towers = tuple(f"{tower}." for tower in self.towers)
        self._run_outer = [name for name in self._outer if not name.startswith(towers)]
        self.weights: CheckpointWeights | None = None
        self._published: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        if reader is not None:
            self.weights = CheckpointWeights(reader, model, self._canonical, (list_name, len(blocks)), stacked, experts)
            self.parts = self.weights.parts
        else:
            _check_parameters(model)
            names, self._shapes = published_names(model, stacked)
            parts = expert_parts(experts, names, stacked, self._shapes.__getitem__)
            self._published = {**names.key_of, **{name: part.source for name, part in parts.items()}}
            self.parts = {name: part for name, part in parts.items() if not part.is_whole}
        self.gates = {
            gate for name, block in zip(self.block_names, self.blocks, strict=True) for gate in gates_of(block, name)
        }
        first = next(iter(iterate_linears(self.blocks[0], self.block_names[0])))
        self.storage_dtype = self._stored_dtype(f"{first[0]}.weight")
        self.dtype = dtype or fast_dtype(self.storage_dtype, device)
        self.products: Bf16Products | None = None
        self._rewrap: Callable[[Tensor], Any] | None = None
        self._returns_more = False
        self._shared: dict[str, Tensor] = {}
        self._shared_by_blocks = {first for first in self._canonical.values() if first.startswith(f"{list_name}.")}
        if self.weights is not None:
            # Buffers that are not in the checkpoint (rotary frequencies, causal masks) were made on the CPU.
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and not buffer.is_meta:
                        module._buffers[name] = buffer.to(device)
        else:
            # A caller's model keeps its device and dtype: moving it would change an object that the caller owns.
            parameter = next(self.blocks[0].parameters())
            self.device, self.dtype = parameter.device, parameter.dtype

    # ------------------------------------------------------------------ weights

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def config(self) -> PretrainedConfig:
        config = self.model.config
        assert isinstance(config, PretrainedConfig)
        return config

    def expect(self, digests: dict[str, str]) -> None:
        """Compares every tensor read from now on with these digests, which any process may have computed.

        See :meth:`CheckpointReader.get`. It has no effect on a model in memory, which is not read again.
        """
        if self.weights is not None:
            self.weights.reader.expect(digests)

    def unused(self) -> str | None:
        """A warning that names tensors which the model does not use, or not for text; None if there are none."""
        said = []
        if self.towers:
            tensors = sum(name.startswith(tuple(f"{tower}." for tower in self.towers)) for name in self._outer)
            said.append(f"{' and '.join(self.towers)} ({tensors} tensors) read no text; copied as they are, not pruned")
        names = self.weights.unused if self.weights is not None else []
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            said.append(f"the model of config.json does not use {names[0]}{more}; copied as they are, not pruned")
        return "; ".join(said) or None

    def linears(self, index: int) -> list[LinearView]:
        """The linears of block ``index`` that are pruned with it.

        A linear tied to the embedding or the head is left out, and so are one tied to an earlier block, with which it
        is pruned, and :attr:`gates`.
        """
        prefix = self.block_names[index]
        views = []
        for name, module in iterate_linears(self.blocks[index], prefix):
            if f"{name}.weight" not in self.gates and self.owns(f"{name}.weight"):
                views.append(LinearView(name, module, self._stored_dtype(f"{name}.weight")))
        return views

    def mixtures(self, index: int) -> list[Mixture]:
        """The mixtures of block ``index`` whose experts the model stacks."""
        return list(mixtures_of(self.blocks[index], self.block_names[index]))

    @contextlib.contextmanager
    def block(self, index: int, pruned: CheckpointReader | None = None) -> Iterator[nn.Module]:
        """Loads the weights of block ``index`` onto the device, in the computing dtype, until the context ends.

        A model that the caller holds in memory keeps its weights afterwards.

        Args:
            index: which block.
            pruned: other weights, named as in :meth:`block_tensors`: the shard of the pruned block, or a checkpoint;
                None for the model's own.
        """
        try:
            self._load(self._names_of(index), pruned)
            yield self.blocks[index]
        finally:
            self._release(self._names_of(index))

    @contextlib.contextmanager
    def outer(self, *, head: bool = True) -> Iterator[None]:
        """Loads embedding, final norm and head until the context ends; ``head=False`` leaves out the head."""
        try:
            self._load(self._outer_names(head))
            yield
        finally:
            self._release(self._run_outer)

    @torch.no_grad()
    def settle_block(self, index: int) -> None:
        """Rounds every weight of the loaded block to its storage dtype, so that the block in memory equals the block
        on disk.

        Raises:
            NumericalError: a weight is NaN, or too large for that dtype; nothing of the block has been written.
        """
        for name in self._names_of(index):
            value, stored = self._value(name), self._stored_dtype(name)
            if value.is_floating_point():
                if value.dtype != stored:
                    value.copy_(value.to(stored))
                if stored.itemsize > 1:
                    value.add_(0.0)  # no negative zero is written
            if isinstance(value, nn.Parameter) and (bad := not_finite(value.detach())):
                raise _not_writable(name, bad, stored)

    def block_parameters(self, index: int) -> dict[str, nn.Parameter]:
        """The floating-point parameters of the loaded block ``index``, by name."""
        values = {name: self._value(name) for name in self._names_of(index)}
        return {name: v for name, v in values.items() if isinstance(v, nn.Parameter) and v.is_floating_point()}

    def written_dtypes(self, index: int) -> dict[str, tuple[torch.dtype, torch.dtype]]:
        """For each of :meth:`block_parameters`, its computing dtype and its storage dtype."""
        return {name: (p.dtype, self._stored_dtype(name)) for name, p in self.block_parameters(index).items()}

    def is_shared(self, name: str) -> bool:
        """Whether a parameter is used in several places: in two blocks, or in a block and the embedding."""
        return name in self._canonical

    def home(self, name: str) -> tuple[int, str]:
        """The first block that uses a parameter of a block, with which it is pruned and written, and its name there."""
        blocks = f"{self.block_names[0].rpartition('.')[0]}."
        first = self._canonical.get(name, name)
        if not first.startswith(blocks):  # outside the blocks too
            first = name
        return int(first.removeprefix(blocks).partition(".")[0]), first

    def outside(self, name: str) -> str | None:
        """A name of the same parameter outside the blocks; None if there is none."""
        first = self._canonical.get(name)
        return next((each for each in self._outer if first is not None and self._canonical.get(each) == first), None)

    def owns(self, name: str) -> bool:
        """Whether this is the first name of a parameter. A parameter with several names counts under its first only."""
        return self._canonical.get(name, name) == name

    def counts(self, name: str) -> bool:
        """Whether a parameter of a block counts under this name: the first of its names that is in a block."""
        first, blocks = self._canonical.get(name), self.block_names[0].removesuffix("0")
        return first is None or name == next(
            other for other, same in self._canonical.items() if same == first and other.startswith(blocks)
        )

    def parameter(self, name: str, pruned: CheckpointReader | None = None) -> Tensor:
        """The values of one parameter: from ``pruned`` if it is there, else as loaded, else from the checkpoint."""
        key, reader = self._key(name), pruned
        if reader is None or key not in reader:
            value = self._value(name).detach()
            if not value.is_meta or self.weights is None:
                return value
            reader = self.weights.reader
        whole = reader.get(key)
        return self.parts[name].of(whole) if name in self.parts else whole

    def set_parameter(self, name: str, value: nn.Parameter) -> None:
        """Replaces the parameter of this name."""
        owner, _, leaf = name.rpartition(".")
        self.model.get_submodule(owner)._parameters[leaf] = value

    def outer_elements(self, *, head: bool = True) -> int:
        """The number of elements that :meth:`outer` loads."""
        first = {self._canonical.get(name, name): self._value(name).numel() for name in self._outer_names(head)}
        return sum(first.values())

    def _outer_names(self, head: bool) -> list[str]:
        base = f"{self.model.base_model_prefix}."
        bare = not head and any(name.startswith(base) for name in self._run_outer)
        return [name for name in self._run_outer if not bare or name.startswith(base)]

    def block_tensors(self, index: int) -> dict[str, TensorSource]:
        """The weights of a loaded block under the checkpoint's names and in its dtypes, ready to be written."""
        return self._tensors(self._names_of(index))

    def stored_block(self, index: int) -> dict[str, Tensor]:
        """The weights of a block read from the checkpoint, under its names, loaded or not; tied weights once."""
        assert self.weights is not None, "a model in memory has no checkpoint"
        keys = [self._key(name) for name in self._names_of(index) if self._canonical.get(name, name) == name]
        return self.weights.reader.read(list(dict.fromkeys(keys)))

    def outer_tensors(self) -> dict[str, TensorSource]:
        """Every tensor outside the blocks, unchanged, tied weights once. Each is read only when it is written."""
        if self.weights is None:
            return self._tensors(self._outer)
        blocks = {self.weights.key_of[name] for index in range(len(self)) for name in self._names_of(index)}
        reader = self.weights.reader
        return {
            key: TensorSource(reader.dtype(key), reader.shape(key), partial(reader.get, key))
            for key in reader
            if key not in blocks
        }

    def _tensors(self, names: list[str]) -> dict[str, TensorSource]:
        written = {}
        members: dict[str, list[str]] = {}
        for name in names:
            if self._canonical.get(name, name) != name:
                continue
            if name in self.parts:
                members.setdefault(self._key(name), []).append(name)
            else:
                written[self._key(name)] = TensorSource.of(self._value(name).detach(), self._stored_dtype(name))
        for key, own in members.items():
            shape = self._shapes[key] if self.weights is None else self.weights.reader.shape(key)
            dtype = self._stored_dtype(own[0])
            written[key] = TensorSource(dtype, shape, partial(self._joined, own, shape, dtype))
        return written

    def _joined(self, names: list[str], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of the checkpoint from all weights that are parts of it."""
        whole = torch.empty(shape, dtype=dtype, device=self.device)
        for name in names:
            self.parts[name].of(whole).copy_(self._value(name).detach())
        return whole

    def _key(self, name: str) -> str:
        """The name of a weight in the checkpoint that is read, or that is written of a model in memory."""
        return self.weights.key_of[name] if self.weights is not None else self._published[name]

    def _value(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        value = getattr(self.model.get_submodule(owner), leaf)
        assert isinstance(value, Tensor)
        return value

    def _stored_dtype(self, name: str) -> torch.dtype:
        if self.weights is not None:
            return self.weights.dtype(name)
        return self._value(name).dtype

    def _all_names(self) -> list[str]:
        return list(self.model.state_dict(keep_vars=True))

    def _names_of(self, index: int) -> list[str]:
        return [f"{self.block_names[index]}.{name}" for name in self.blocks[index].state_dict(keep_vars=True)]

    def _load(self, names: list[str], pruned: CheckpointReader | None = None) -> None:
        if self.weights is None:
            if pruned is not None:
                for name in names:
                    if self._canonical.get(name, name) == name:
                        self._value(name).detach().copy_(self.parameter(name, pruned))
            return
        loaded: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}  # tensors of the checkpoint of which several weights are parts
        for name in names:  # one at a time, so that at most one weight is in memory twice
            canonical = self._canonical.get(name, name)
            if canonical not in loaded:
                own = pruned if canonical == name else None  # one of an earlier block was pruned with that
                loaded[canonical] = self._fetch(canonical, own, whole)
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(loaded[canonical], requires_grad=False)
            else:
                module._buffers[leaf] = loaded[canonical]

    def _fetch(self, name: str, pruned: CheckpointReader | None, whole: dict[str, Tensor]) -> Tensor:
        """A weight, on the device, in the computing dtype. What is read for its part alone is added to ``whole``."""
        key = self._key(name)
        if name in self._shared and (pruned is None or key not in pruned):
            shared = self._shared[name]
            return shared.to(self.device, self.dtype if shared.is_floating_point() else None)
        if name not in self.parts:
            return self._read(key, pruned)
        if key not in whole:
            whole[key] = self._read(key, pruned)
        return self.parts[name].of(whole[key])

    def _read(self, key: str, pruned: CheckpointReader | None) -> Tensor:
        assert self.weights is not None
        if pruned is not None and key in pruned:
            return pruned.get(key, self.device, self.dtype)
        return self.weights.reader.get(key, self.device, self.dtype)

    def forget_shared(self) -> None:
        """Forgets the weights that blocks share, so that they are read again: for a walk over other weights."""
        self._shared.clear()

    @contextlib.contextmanager
    def unpruned(self) -> Iterator[None]:
        """Until the context ends, blocks without a shard are the model's own, with the weights that they share."""
        pruned, self._shared = self._shared, {}
        try:
            yield
        finally:
            self._shared = pruned

    def _release(self, names: list[str]) -> None:
        if self.weights is None:
            return
        for name in names:
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if leaf in module._parameters and module._parameters[leaf] is not None:
                value = module._parameters[leaf]
                assert value is not None
                canonical = self._canonical.get(name, name)
                if canonical in self._shared_by_blocks and not value.is_meta:
                    # A weight shared by several blocks is pruned in the first; later blocks must load the pruned one.
                    self._shared[canonical] = value.detach().to(self.weights.dtype(canonical), copy=True)
                module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)

    # ------------------------------------------------------------------ running

    @torch.no_grad()
    def start(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Runs the model's own forward up to the blocks.

        The embedding and block 0 must be loaded. The first call runs block 0 on a few tokens, to learn the type of its
        return value. If it returns more than hidden states, block 0 runs on all tokens.

        Args:
            ids: token ids, ``(batch, seq)``.

        Returns:
            The hidden states that enter block 0, ``(batch, seq, hidden)``, and the other arguments of every block.

        Raises:
            ModelError: the model's own forward fails, or is not a plain chain of the blocks.
        """
        if self._rewrap is None and ids.shape[1] > SHOWN_TOKENS:
            self._capture(ids[:1, :SHOWN_TOKENS])
            if self._returns_more:  # the shapes of the other values may depend on the tokens
                self._rewrap = None
        return self._capture(ids)

    def _capture(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        entering: list[Tensor] = []
        calls: list[Call] = []

        def record(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, call = _split_call(args, kwargs)
            self._check_next(index, len(calls), hidden, entering)
            calls.append(call)
            if not entering:
                entering.append(hidden)
                if self._rewrap is None:
                    output = forward(*args, **kwargs)
                    self._rewrap = _learn_return(output, hidden, self.blocks[index])
                    self._returns_more = isinstance(output, (tuple, list)) and any(x is not None for x in output[1:])
            assert self._rewrap is not None
            return self._rewrap(hidden)

        try:
            with self._intercepted(record):
                self.model.base_model(ids.to(self.device), use_cache=False)
        except (SparseLLMError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # from the model's own code, for example if numbers in the config contradict
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"the forward of {type(self.model).__name__} fails on token ids of shape {tuple(ids.shape)} "
                f"({type(error).__name__}: {why[:200]}); check its config.json, and that transformers runs it"
            ) from error
        if len(calls) < len(self.blocks):
            raise ModelError(f"the forward of {type(self.model).__name__} does not call {self.block_names[len(calls)]}")
        return entering[0], calls

    def _check_next(self, index: int, called: int, hidden: Tensor, entering: list[Tensor]) -> None:
        """Refuses a call of block ``index`` after ``called`` others, if that is no step of a plain chain.

        While arguments are captured every block returns its input, so all of them get the hidden states that entered
        the first one.
        """
        family = type(self.model).__name__
        if index != called:
            twice = "more than once" if index < called else f"before {self.block_names[called]}"
            raise ModelError(
                f"the forward of {family} calls {self.block_names[index]} {twice}; only models that call each block "
                "once, in order, are pruned"
            )
        if entering and hidden is not entering[0] and not torch.equal(hidden, entering[0]):
            raise ModelError(
                f"the forward of {family} changes the hidden states between {self.block_names[index - 1]} and "
                f"{self.block_names[index]}; only models whose blocks follow each other directly are pruned"
            )

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """One block on hidden states ``(batch, seq, hidden)``; its weights must be loaded."""
        return self.apply(index, hidden, call)

    def apply(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """As :meth:`run`, but with gradients where they are enabled."""
        with bf16_products(self.products):
            own = hidden.clone()  # a block may change its input in place, and the caller uses the input again
            return hidden_of(call.on(self.blocks[index], own), self.blocks[index])

    @torch.no_grad()
    def finish(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """As :meth:`logits`, without gradients."""
        return self.logits(hidden, ids)

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Norm and head, through the model's own forward: logits ``(batch, seq, vocabulary)``.

        Args:
            hidden: the output of the last block, ``(batch, seq, hidden)``.
            ids: the token ids that belong to it.
        """

        def replay(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert self._rewrap is not None, "start() comes before finish()"
            return self._rewrap(hidden if index == len(self.blocks) - 1 else _split_call(args, kwargs)[0])

        # The loss of the routers would need outputs of the blocks, which do not run here.
        options = (
            {"output_router_logits": False}
            if "output_router_logits" in signature(self.model.forward).parameters
            else {}
        )
        with self._intercepted(replay), bf16_products(self.products):
            logits = self.model(ids.to(self.device), use_cache=False, **options).logits
        assert isinstance(logits, Tensor)
        return logits

    @contextlib.contextmanager
    def _intercepted(self, handle: Callable[..., Any]) -> Iterator[None]:
        """Redirects every block's forward to ``handle(index, forward, args, kwargs)`` until the context ends.

        ``forward`` is set on the instance and deleted afterwards. The block itself stays in the model, because the
        forwards of some models read its other attributes (Qwen reads the type of attention).
        """

        def divert(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: handle(index, forward, args, kwargs)

        for index, block in enumerate(self.blocks):
            block.forward = divert(index, block.forward)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def open_chain(
    model: PreTrainedModel | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Chain:
    """A chain over a checkpoint directory (weights read lazily) or over a model in memory.

    Args:
        model: the directory, or the model. The walk changes the weights of a model in memory.
        device: where blocks run; a model in memory runs where it is.
        dtype: the computing dtype of blocks; None for the fastest that is at least as precise as the stored one.
        trust_remote_code: run the modelling code that comes with the checkpoint.

    Raises:
        ModelError: not a decoder-only model, or weights do not fit its config.
        StorageError: the weight files cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        return Chain(model, None, device=device, dtype=dtype)
    config = load_config(model, trust_remote_code=trust_remote_code)
    reader = open_checkpoint(model)
    check_sizes(config, reader)
    return Chain(_empty_model(config, model, trust_remote_code), reader, device=device, dtype=dtype)


def _empty_model(config: PretrainedConfig, directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a config, its weights on the meta device."""
    try:
        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        empty.tie_weights()
    except Exception as error:  # a wrong config raises KeyError, ValueError, RuntimeError, ZeroDivisionError, ...
        raise ModelError(
            f"transformers cannot build the {config.model_type} of {directory / 'config.json'}: {one_line(error)}"
        ) from None
    assert isinstance(empty, PreTrainedModel)
    return empty


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in WEIGHT_DTYPES:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(
                f"weight {name} of the model is {dtype}; load the model in bfloat16, float16, float32 or float64"
            )


def _not_writable(name: str, values: int, stored: torch.dtype) -> NumericalError:
    dtype, largest = str(stored).removeprefix("torch."), torch.finfo(stored).max
    wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(stored)
    cure = f"store the model in {wider} and prune that" if wider else "raise the method's damping"
    return NumericalError(
        f"weight {name} would get {values} infinite or NaN values once pruned and rounded to {dtype}, whose largest "
        f"number is {largest:.5g}; {cure}, or exclude it. The block was not written; blocks before it are kept"
    )


def fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The stored dtype if the device multiplies matrices in it, else fp32.

    Many CPUs emulate half precision, at a fifth of the speed and with less accuracy.
    """
    if stored not in (torch.bfloat16, torch.float16) or device.type != "cpu":
        return stored
    return stored if stored is torch.bfloat16 and bf16_is_native() else torch.float32


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter that has several, keyed by every one of its names."""
    first: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return {name: canonical for canonical, names in groups.items() if len(names) > 1 for name in names}


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, which are the first tensor among a block's arguments, and the other arguments."""
    if args and isinstance(args[0], Tensor):
        return args[0], Call(args[1:], kwargs, None)
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
            return value, Call(args, {k: v for k, v in kwargs.items() if k != key}, key)
    raise ModelError("a block is called without hidden states (batch, seq, hidden); this model is not a plain chain")


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_converted(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _converted(item, dtype) for key, item in value.items()}
    return value


def hidden_of(output: Any, block: nn.Module) -> Tensor:
    """The hidden states in the return value of a block."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"{type(block).__name__} returns {type(output).__name__}, not hidden states")
    return hidden


def _learn_return(output: Any, hidden: Tensor, block: nn.Module) -> Callable[[Tensor], Any]:
    if hidden_of(output, block).shape != hidden.shape:
        raise ModelError(f"{type(block).__name__} changes the shape of its hidden states; this is not a plain chain")
    if isinstance(output, (tuple, list)):
        rest = tuple(output[1:])
        make = getattr(output, "_make", tuple)  # of a named tuple
        return lambda value: make((value, *rest))
    return lambda value: value
