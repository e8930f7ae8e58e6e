"""Mixtures of experts: every expert's matrices as separate linears, however the model stacks them.

transformers keeps the weights of all experts of a block in a few parameters. A chain works on a twin of the model in
which each expert is a small module with a linear for each matrix, whose weights are views of the stacked parameters, or
read from the checkpoint one by one. The twin shares everything else with the model, which is not changed.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm.errors import ModelError
from sparsellm.model.structure import LinearView

Index = tuple[int | slice, ...]
GATE = "gate_proj"
UP = "up_proj"
DOWN = "down_proj"
# arguments of a forward that gets tokens, the experts of each, and their weights
_ROUTED = 3
STACKED = "separated"  # attribute of a mixture in the twin: the parts of its stacked parameters


@dataclass(frozen=True)
class Part:
    """A matrix or a bias as a part of the tensor ``source``: selected by ``index``, then transposed or not."""

    source: str
    index: Index = ()
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the part."""
        if self.index:
            tensor = tensor[self.index]
        if self.transposed:
            tensor = tensor.mT
        return tensor


@dataclass(frozen=True)
class Routed:
    """The tokens of one call of a mixture."""

    inputs: Tensor  # (tokens, width)
    experts: Tensor  # numbers of the experts of each token, (tokens, k)
    weights: Tensor  # factors of their outputs, (tokens, k)
    places: Tensor  # positions of the tokens in the flattened batch, (tokens,)


class ExpertLinear(nn.Linear):
    """One matrix of one expert; its weight ``(out, in)`` may be a view of a larger tensor."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
        )


def without_experts(linears: Iterable[LinearView]) -> list[LinearView]:
    """The linears that belong to no separated expert."""
    return [linear for linear in linears if not isinstance(linear.module, ExpertLinear)]


class Expert(nn.Module):
    """``down(φ(gate(x)) ∘ up(x))`` or ``down(φ(up(x)))``, then perhaps a norm of its mixture."""

    def __init__(
        self, mixture: nn.Module, layout: _Layout, matrices: dict[str, ExpertLinear]
    ) -> None:
        super().__init__()
        # in a tuple, so that it is not a submodule
        self._mixture: tuple[Any] = (mixture,)
        self._layout = layout
        self.normed = layout.normed
        for role, linear in matrices.items():
            self.add_module(role, linear)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule(DOWN)(self.inner(x))
        if self.normed:
            y = self._mixture[0].post_expert_norm(y)
        return y

    def inner(self, x: Tensor) -> Tensor:
        """The input of the last linear, for ``x (tokens, width)``."""
        layout = self._layout
        up = self.get_submodule(UP)(x)
        if GATE not in self._modules:
            return layout.activation(up)
        gate = self.get_submodule(GATE)(x)
        if layout.apply_gate is None:
            product: Tensor = layout.activation(gate) * up
            return product
        if layout.interleaved:
            both = torch.stack((gate, up), -1).flatten(-2)
        else:
            both = torch.cat((gate, up), -1)
        return layout.apply_gate(both)

    def frozen(self) -> Expert:
        """A copy with copies of its weights."""
        linears = {name: copy.deepcopy(child) for name, child in self.named_children()}
        return Expert(self._mixture[0], self._layout, linears)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in a block of a chain, whose children ``0``, ``1``, ... are experts."""

    module: nn.Module
    name: str  # in the block

    def __len__(self) -> int:
        return sum(isinstance(child, Expert) for child in self.module.children())

    def expert(self, number: int) -> Expert:
        child = self.module.get_submodule(str(number))
        assert isinstance(child, Expert)
        return child

    @property
    def weighs_outputs(self) -> bool:
        """Whether the router's weights multiply the outputs of experts; else they multiply the inputs."""
        return self.expert(0)._layout.routed

    @contextlib.contextmanager
    def observed(self, record: Callable[[Routed], None]) -> Iterator[None]:
        """Calls ``record`` with the tokens of each call, and returns zeros as outputs, until the context ends."""
        vars(self.module)["record"] = record
        try:
            yield
        finally:
            vars(self.module)["record"] = None


@dataclass(frozen=True)
class _Layout:
    """How a mixture stores its experts, and what each computes."""

    parts: list[dict[str, Part]]  # for every expert, by role and "weight" or "bias"
    activation: Callable[[Tensor], Tensor]
    # from one tensor with gate and up; None for φ(gate) ∘ up
    apply_gate: Callable[[Tensor], Tensor] | None = None
    # whether that tensor has the outputs of gate and up in turn
    interleaved: bool = False
    normed: bool = False  # whether the output of an expert is normalised
    routed: bool = True  # the forward gets tokens, their experts and weights; else see _forward_of_all


def separate_experts(model: Any) -> tuple[Any, dict[str, Part]]:
    """A twin of a model with experts as separate linears, and for each of their weights and biases its part of a
    parameter of the model; the model itself and no parts if it has no stacked experts. A ModelError says that a module
    around a mixture has a forward of its own, as the hooks of accelerate set it."""
    twins: dict[int, nn.Module] = {}
    twin = _twin(model, twins)
    parts: dict[str, Part] = {}
    for name, module in twin.named_modules(remove_duplicate=False):
        for inner, part in vars(module).get(STACKED, {}).items():
            source = f"{name}.{part.source}"
            parts[f"{name}.{inner}"] = replace(part, source=source)
    return twin, parts


def gates_of(module: nn.Module, prefix: str) -> set[str]:
    """The weights inside a block whose outputs choose or scale other modules, by name: routers of mixtures, and linears
    with a single output, which scales all features alike (the gate of a shared expert)."""
    gates: set[str] = set()
    for name, child in module.named_modules():
        if STACKED in vars(child):
            gates.update(_routers(module, name, len(Mixture(child, name))))
        elif isinstance(child, nn.ModuleList) and len(child) > 1:
            gates.update(_routers(module, name, len(child)))
        elif isinstance(child, nn.Linear) and child.out_features == 1:
            gates.add(f"{name}.weight")
    return {f"{prefix}.{name}" for name in gates}


def _routers(module: nn.Module, mixture: str, experts: int) -> Iterator[str]:
    """Matrices next to a mixture with an output for each expert, unless another matrix reads it (a shared expert)."""
    scope = mixture.rpartition(".")[0]
    for name, parameter in module.get_submodule(scope).named_parameters(prefix=scope):
        if (
            parameter.dim() != 2
            or len(parameter) != experts
            or name.startswith(f"{mixture}.")
        ):
            continue
        around = name.rpartition(".")[0].rpartition(".")[0]
        if around == scope or not any(
            reader.dim() == 2 and reader.shape[1] == experts
            for reader in module.get_submodule(around).parameters()
        ):
            yield name


def _twin(module: nn.Module, twins: dict[int, nn.Module]) -> nn.Module:
    """The twin of a module; the module itself if it contains no mixture."""
    if id(module) in twins:
        return twins[id(module)]
    layout = _layout_of(module)
    children = {
        name: child if child is None else _twin(child, twins)
        for name, child in module._modules.items()
    }
    if layout is None and children == module._modules:
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
        values = {
            name: part.of(module.get_parameter(part.source).detach())
            for name, part in parts.items()
        }
        linears = {
            role: ExpertLinear(values[f"{role}.weight"], values.get(f"{role}.bias"))
            for role in (GATE, UP, DOWN)
            if f"{role}.weight" in values
        }
        twin._modules[str(number)] = Expert(twin, layout, linears)
        stacked.update({f"{number}.{inner}": part for inner, part in parts.items()})
    sources = {part.source for part in stacked.values()}
    vars(twin)["_parameters"] = {
        name: p for name, p in twin._parameters.items() if name not in sources
    }
    for source in sources:
        # DBRX: the parameters belong to a child, which the experts replace
        twin._modules.pop(source.rpartition(".")[0], None)
    forward: Callable[..., Tensor] = _forward
    if not layout.routed:
        forward = _forward_of_all
    vars(twin).update(
        {STACKED: stacked, "record": None, "forward": MethodType(forward, twin)}
    )


def _forward(self: Any, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Runs each expert of the twin of a mixture on the tokens of ``inputs (..., width)`` routed to it, and adds up its
    weighted outputs; experts and weights ``(tokens, k)``, where numbers beyond the last expert are ignored."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    return _outputs(
        self, Routed(flat, chosen, weights, torch.arange(len(flat), device=flat.device))
    ).view_as(inputs)


def _forward_of_all(self: Any, inputs: Tensor) -> Tensor:
    """``_forward`` for inputs ``(experts · tokens, width)`` that are weighted, and zero where not routed."""
    by_expert = inputs.view(len(Mixture(self, "")), -1, inputs.shape[-1])
    numbers, tokens = torch.where((by_expert != 0).any(-1))
    ones = inputs.new_ones(len(numbers), 1)
    total = torch.zeros_like(by_expert)
    total[numbers, tokens] = _outputs(
        self, Routed(by_expert[numbers, tokens], numbers[:, None], ones, tokens)
    )
    return total.view_as(inputs)


def _outputs(self: Any, routed: Routed) -> Tensor:
    """The outputs of a mixture ``(tokens, width)``; zeros while tokens are recorded."""
    total = torch.zeros_like(routed.inputs)
    if self.record is not None:
        self.record(routed)
        return total
    for number in routed.experts.unique().tolist():
        if str(number) in self._modules:
            tokens, places = torch.where(routed.experts == number)
            outputs = (
                self._modules[str(number)](routed.inputs[tokens])
                * routed.weights[tokens, places, None]
            )
            total.index_add_(0, tokens, outputs.to(total.dtype))
    return total


def _layout_of(module: Any) -> _Layout | None:
    """How a module stores its experts; None if it does not stack any, or in a way that is not known."""
    flags = ("is_transposed", "has_bias", "has_gate", "is_concatenated")
    # set by use_experts_implementation
    if all(isinstance(vars(module).get(flag), bool) for flag in flags):
        return _decorated(module)
    takes = len(inspect.signature(module.forward).parameters)
    stacks = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    if set(stacks) == {"gate_up_proj", "down_proj"} and takes == 1:  # Llama 4
        parts = _three_dimensional(
            stacks["gate_up_proj"].shape, transposed=True, gated=True
        )
        return _Layout(parts, module.act_fn, routed=False)
    if set(stacks) == {"mlp.w1", "mlp.v1", "mlp.w2"} and takes == _ROUTED:  # DBRX
        # each is (experts · inner, width)
        inner = module.mlp.w1.shape[0] // module.num_experts
        sources = {GATE: "mlp.w1", UP: "mlp.v1", DOWN: "mlp.w2"}
        parts = []
        for number in range(module.num_experts):
            rows = slice(number * inner, (number + 1) * inner)
            parts.append(
                {
                    f"{role}.weight": Part(name, (rows,), role == DOWN)
                    for role, name in sources.items()
                }
            )
        return _Layout(parts, module.mlp.activation_fn)
    return None


def _decorated(module: Any) -> _Layout:
    """The layout that the flags of transformers' ``use_experts_implementation`` describe."""
    from transformers.integrations.moe import _default_apply_gate

    interleaved = not module.is_concatenated
    name = "up_proj"
    gate = None
    if module.has_gate:
        name = "gate_up_proj"
        if type(module)._apply_gate is not _default_apply_gate:
            gate = module._apply_gate
    parts = _three_dimensional(
        module.get_parameter(name).shape,
        module.is_transposed,
        gated=module.has_gate,
        interleaved=interleaved,
        biased=module.has_bias,
    )
    activation = getattr(module, "act_fn", nn.Identity())
    normed = bool(getattr(module, "has_post_expert_norm", False))
    return _Layout(parts, activation, gate, interleaved=interleaved, normed=normed)


def _three_dimensional(
    shape: tuple[int, ...],
    transposed: bool,
    gated: bool,
    interleaved: bool = False,
    biased: bool = False,
) -> list[dict[str, Part]]:
    """The parts of ``gate_up_proj (experts, 2 · inner, width)``, or ``up_proj``, of this shape, and of ``down_proj
    (experts, width, inner)``, or of their transposes, and of their biases ``(experts, outputs)``. Interleaved, the
    outputs of gate and up come in turn, not one after the other."""
    half = shape[1] // 2
    if transposed:
        half = shape[2] // 2
    first = "up_proj"
    outputs: dict[str, Index] = {UP: ()}
    if gated:
        first = "gate_up_proj"
        outputs = {GATE: (slice(0, half),), UP: (slice(half, 2 * half),)}
        if interleaved:
            outputs = {GATE: (slice(0, None, 2),), UP: (slice(1, None, 2),)}
    parts = []
    for number in range(shape[0]):
        expert = {f"{DOWN}.weight": Part(DOWN, (number,), transposed)}
        for role, rows in outputs.items():
            across: Index = ()
            if transposed and rows:
                across = (slice(None),)
            expert[f"{role}.weight"] = Part(first, (number, *across, *rows), transposed)
            if biased:
                expert[f"{role}.bias"] = Part(f"{first}_bias", (number, *rows))
        if biased:
            expert[f"{DOWN}.bias"] = Part(f"{DOWN}_bias", (number,))
        parts.append(expert)
    return parts
