"""Mixtures of experts: every expert's matrices as separate linears, however the model stacks them.

transformers keeps the weights of all experts of a block in a few parameters: three-dimensional, transposed or not, gate
and up one after the other or interleaved, with or without biases; or two-dimensional stacks (DBRX). A chain works on a
twin of the model in which each expert is a small module with a linear for each matrix. The weights of these linears are
views of the stacked parameters, or read from the checkpoint one by one; everything else of the model is shared, and the
model itself is not changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm.errors import ModelError

Index = tuple[int | slice, ...]
Record = Callable[["Routed"], None]
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
_ROUTED = 3  # arguments of a forward that gets tokens, the experts of each, and their weights
_STACKED = "separated"  # attribute of a mixture in the twin: the parts of its stacked parameters


@dataclass(frozen=True)
class Part:
    """A matrix or a bias as a part of a larger tensor.

    Attributes:
        source: the name of the tensor.
        index: selects the part.
        transposed: whether the part is then transposed.
    """

    source: str
    index: Index = ()
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        return not self.index and not self.transposed

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the part."""
        selected = tensor[self.index] if self.index else tensor
        return selected.mT if self.transposed else selected


@dataclass(frozen=True)
class Routed:
    """The tokens of one call of a mixture.

    Attributes:
        inputs: ``(tokens, width)``.
        experts: the numbers of the experts of each token, ``(tokens, k)``.
        weights: the factors of their outputs, ``(tokens, k)``.
        places: of the tokens in the flattened batch ``(tokens,)``.
    """

    inputs: Tensor
    experts: Tensor
    weights: Tensor
    places: Tensor


class ExpertLinear(nn.Linear):
    """One matrix of one expert; its weight ``(out, in)`` may be a view of a larger tensor."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


class Expert(nn.Module):
    """``down(φ(gate(x)) ∘ up(x))`` or ``down(φ(up(x)))``, with the activation of its mixture.

    Args:
        mixture: the twin of the model's own module, which has the activation.
        layout: of the mixture.
        matrices: the linears, by role.
    """

    def __init__(self, mixture: nn.Module, layout: _Layout, matrices: dict[str, ExpertLinear]) -> None:
        super().__init__()
        self._owner: tuple[Any] = (mixture,)  # in a tuple, so that it is not a submodule
        self._layout = layout
        for role, linear in matrices.items():
            self.add_module(role, linear)

    def forward(self, x: Tensor) -> Tensor:
        leaving: Tensor = self.get_submodule(DOWN)(self.inner(x))
        return self._owner[0].post_expert_norm(leaving) if self._layout.normed else leaving

    def inner(self, x: Tensor) -> Tensor:
        """The input of the last linear, for ``x (tokens, width)``."""
        layout, up = self._layout, self.get_submodule(UP)(x)
        if not layout.gated:
            return layout.activation(up)
        if layout.apply_gate is None:
            product: Tensor = layout.activation(self.get_submodule(GATE)(x)) * up
            return product
        parts = (self.get_submodule(GATE)(x), up)
        both = torch.stack(parts, -1).flatten(-2) if layout.interleaved else torch.cat(parts, -1)
        inner: Tensor = layout.apply_gate(both)
        return inner

    def frozen(self) -> Expert:
        """A copy with weights of its own, which later changes of this expert do not affect."""
        linears = {name: _copied(child) for name, child in self.named_children() if isinstance(child, ExpertLinear)}
        return Expert(self._owner[0], self._layout, linears)


def _copied(linear: ExpertLinear) -> ExpertLinear:
    bias = linear.bias
    return ExpertLinear(linear.weight.detach().clone(), bias.detach().clone() if bias is not None else None)


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in a block of a chain.

    Attributes:
        name: in the whole model.
        module: holds the experts as children ``0``, ``1``, ...
    """

    name: str
    module: nn.Module

    def __len__(self) -> int:
        return sum(isinstance(child, Expert) for child in self.module.children())

    def expert(self, number: int) -> Expert:
        child = self.module.get_submodule(str(number))
        assert isinstance(child, Expert)
        return child

    def observe(self, record: Record | None) -> None:
        """Calls ``record`` with the tokens of each call from now on, in place of computing the outputs; None to stop.

        The outputs are then zero.
        """
        vars(self.module)["record"] = record


@dataclass(frozen=True)
class _Layout:
    """How a mixture stores its experts.

    Attributes:
        parts: of every expert, by role and ``weight`` or ``bias``.
        activation: φ.
        apply_gate: the mixture's own product of gate and up, of one tensor with both; None for ``φ(gate) ∘ up``.
        interleaved: whether that tensor has the outputs of gate and up in turn.
        gated: whether there is a gate.
        normed: whether the output of an expert is normalised.
        routed: whether the forward gets tokens with their experts and weights, or else the tokens of all experts,
            weighted already, with zeros where a token is not routed.
    """

    parts: list[dict[str, Part]]
    activation: Callable[[Tensor], Tensor]
    apply_gate: Callable[[Tensor], Tensor] | None = None
    interleaved: bool = False
    gated: bool = True
    normed: bool = False
    routed: bool = True


def separate_experts(model: Any) -> tuple[Any, dict[str, Part]]:
    """A twin of a model with experts as separate linears, and for each of their weights and biases its part of a
    parameter of the model; the model itself and no parts if it has no stacked experts.

    The twin shares every other module and parameter with the model. If the model has weights, those of the experts are
    views of them, so that changes in place are changes of the model.

    Raises:
        ModelError: a module around a mixture has a forward of its own, as the hooks of accelerate set it.
    """
    twins: dict[int, nn.Module] = {}
    twin = _twin(model, twins)
    parts: dict[str, Part] = {}
    for name, module in twin.named_modules(remove_duplicate=False):
        for inner, part in vars(module).get(_STACKED, {}).items():
            parts[f"{name}.{inner}"] = Part(f"{name}.{part.source}", part.index, part.transposed)
    return twin, parts


def mixtures_of(module: nn.Module, prefix: str) -> Iterator[Mixture]:
    """The separated mixtures inside a module of a twin, with their names in the whole model."""
    for name, child in module.named_modules():
        if _STACKED in vars(child):
            yield Mixture(f"{prefix}.{name}", child)


def stacks_of(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters in which a module of a model stacks experts, with their names in the whole model."""
    for name, child in module.named_modules():
        layout = _layout_of(child)
        for source in sorted({part.source for parts in layout.parts for part in parts.values()} if layout else ()):
            yield f"{prefix}.{name}.{source}", child.get_parameter(source)


def gates_of(module: nn.Module, prefix: str) -> set[str]:
    """The weights inside a block whose outputs choose or scale other modules, by name; they stay dense.

    These are the matrices beside the experts of a mixture with as many outputs as there are experts (routers), and
    linears with a single output, which scales all features alike (the gate of a shared expert).
    """
    found: set[str] = set()
    for name, child in module.named_modules():
        experts = 0
        if _STACKED in vars(child):
            experts = len(Mixture(name, child))
        elif isinstance(child, nn.ModuleList) and len(child) > 1:
            experts = len(child)
        elif isinstance(child, nn.Linear) and child.out_features == 1:
            found.add(f"{prefix}.{name}.weight")
        if not experts:
            continue
        scope = name.rpartition(".")[0]
        for other, parameter in module.get_submodule(scope).named_parameters(prefix=scope):
            beside = not other.startswith(f"{name}.")
            if beside and parameter.dim() == 2 and len(parameter) == experts:
                found.add(f"{prefix}.{other}")
    return found


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """The twin of a module; the module itself if there is no mixture in it."""
    if id(module) in twins:
        return twins[id(module)]
    layout = _layout_of(module)
    children = {name: child if child is None else _twin(child, twins) for name, child in module._modules.items()}
    if layout is None and all(child is module._modules[name] for name, child in children.items()):
        twins[id(module)] = module
        return module
    if "forward" in vars(module):
        raise ModelError(
            f"{type(module).__name__} of the model has a forward of its own, as a device_map sets it; load the model "
            "without device_map"
        )
    twin = copy.copy(module)
    twins[id(module)] = twin
    vars(twin)["_modules"] = children
    if layout is not None:
        _separate(module, twin, layout)
    return twin


def _separate(module: nn.Module, twin: nn.Module, layout: _Layout) -> None:
    """Replaces the stacked parameters of a mixture's twin by experts, and its forward by one that runs them."""
    stacked: dict[str, Part] = {}
    for number, parts in enumerate(layout.parts):
        linears: dict[str, ExpertLinear] = {}
        for role in (GATE, UP, DOWN):
            if f"{role}.weight" not in parts:
                continue
            values = [
                None if part is None else part.of(module.get_parameter(part.source).detach())
                for part in (parts[f"{role}.weight"], parts.get(f"{role}.bias"))
            ]
            assert values[0] is not None
            linears[role] = ExpertLinear(values[0], values[1])
        twin._modules[str(number)] = Expert(twin, layout, linears)
        stacked.update({f"{number}.{inner}": part for inner, part in parts.items()})
    for source in {part.source for part in stacked.values()}:
        owner, _, leaf = source.rpartition(".")
        if owner:  # DBRX: the parameters belong to a child, which the experts replace
            twin._modules.pop(owner, None)
        else:
            vars(twin)["_parameters"] = {name: p for name, p in twin._parameters.items() if name != leaf}
    vars(twin).update({_STACKED: stacked, "record": None})
    vars(twin)["forward"] = MethodType(_forward if layout.routed else _forward_of_all, twin)


def _forward(self: Any, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Runs each expert on the tokens routed to it, and adds up its weighted outputs.

    Args:
        self: the twin of a mixture.
        inputs: ``(..., width)``.
        chosen: the numbers of the experts of each token, ``(tokens, k)``; numbers beyond the last expert are ignored.
        weights: ``(tokens, k)``.
    """
    flat = inputs.reshape(-1, inputs.shape[-1])
    if self.record is not None:
        self.record(Routed(flat, chosen, weights, torch.arange(len(flat), device=flat.device)))
        return torch.zeros_like(inputs)
    total = torch.zeros_like(flat)
    for number in chosen.unique().tolist():
        if str(number) in self._modules:
            tokens, places = torch.where(chosen == number)
            leaving = self._modules[str(number)](flat[tokens]) * weights[tokens, places, None]
            total.index_add_(0, tokens, leaving.to(total.dtype))
    return total.view_as(inputs)


def _forward_of_all(self: Any, inputs: Tensor) -> Tensor:
    """As :func:`_forward`, for inputs ``(experts · tokens, width)`` that are weighted, and zero where not routed."""
    experts = sum(isinstance(child, Expert) for child in self._modules.values())
    own = inputs.view(experts, -1, inputs.shape[-1])
    routed = (own != 0).any(-1)
    if self.record is not None:
        numbers, tokens = torch.where(routed)
        self.record(Routed(own[numbers, tokens], numbers[:, None], own.new_ones(len(numbers), 1), tokens))
        return torch.zeros_like(inputs)
    total = torch.zeros_like(own)
    for number in range(experts):
        (tokens,) = torch.where(routed[number])
        if len(tokens):
            total[number, tokens] = self._modules[str(number)](own[number, tokens])
    return total.view_as(inputs)


def _layout_of(module: nn.Module) -> _Layout | None:
    """How a module stores its experts; None if it does not stack any, or in a way that is not known."""
    flags = ("is_transposed", "has_bias", "has_gate", "is_concatenated")
    if all(isinstance(vars(module).get(flag), bool) for flag in flags):  # set by use_experts_implementation
        return _decorated(module)
    takes = len(inspect.signature(module.forward).parameters)
    stacks = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    if set(stacks) == {"gate_up_proj", "down_proj"} and takes == 1:  # Llama 4
        return _transposed_stacks(module)
    if set(stacks) == {"mlp.w1", "mlp.v1", "mlp.w2"} and takes == _ROUTED:  # DBRX
        return _two_dimensional_stacks(module)
    return None


def _decorated(module: Any) -> _Layout:
    """The layout that the flags of transformers' ``use_experts_implementation`` describe."""
    from transformers.integrations.moe import _default_apply_gate

    first, gated = ("gate_up_proj", True) if module.has_gate else ("up_proj", False)
    shape = module.get_parameter(first).shape
    width = shape[2 if module.is_transposed else 1]
    rows = {UP: slice(None)}
    if gated:
        half = width // 2
        joined = {GATE: slice(0, half), UP: slice(half, width)}
        rows = joined if module.is_concatenated else {GATE: slice(0, None, 2), UP: slice(1, None, 2)}
    parts = []
    for number in range(shape[0]):
        own = {f"{DOWN}.weight": Part(DOWN, (number,), module.is_transposed)}
        for role, rows_of in rows.items():
            full: Index = (number,) if rows_of == slice(None) else (number, rows_of)
            across: Index = full if len(full) == 1 else (number, slice(None), rows_of)
            own[f"{role}.weight"] = Part(first, across if module.is_transposed else full, module.is_transposed)
            if module.has_bias:
                own[f"{role}.bias"] = Part(f"{first}_bias", full)
        if module.has_bias:
            own[f"{DOWN}.bias"] = Part(f"{DOWN}_bias", (number,))
        parts.append(own)
    default = type(module)._apply_gate is _default_apply_gate
    return _Layout(
        parts,
        getattr(module, "act_fn", nn.Identity()),
        apply_gate=None if default or not gated else module._apply_gate,
        interleaved=not module.is_concatenated,
        gated=gated,
        normed=bool(getattr(module, "has_post_expert_norm", False)),
    )


def _transposed_stacks(module: Any) -> _Layout:
    """``gate_up_proj (experts, width, 2 · inner)`` and ``down_proj (experts, inner, width)``, as Llama 4 has them."""
    experts, _, both = module.gate_up_proj.shape
    cut = {GATE: slice(0, both // 2), UP: slice(both // 2, both)}
    parts = [
        {
            **{f"{role}.weight": Part("gate_up_proj", (number, slice(None), own), True) for role, own in cut.items()},
            f"{DOWN}.weight": Part(DOWN, (number,), True),
        }
        for number in range(experts)
    ]
    return _Layout(parts, module.act_fn, routed=False)


def _two_dimensional_stacks(module: Any) -> _Layout:
    """``w1``, ``v1`` and ``w2`` ``(experts · inner, width)``, as DBRX has them."""
    inner = module.mlp.w1.shape[0] // module.num_experts
    parts = []
    for number in range(module.num_experts):
        rows: Index = (slice(number * inner, (number + 1) * inner),)
        parts.append(
            {
                f"{GATE}.weight": Part("mlp.w1", rows),
                f"{UP}.weight": Part("mlp.v1", rows),
                f"{DOWN}.weight": Part("mlp.w2", rows, True),
            }
        )
    return _Layout(parts, module.mlp.activation_fn)
