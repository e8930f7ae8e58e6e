"""The matrices of a block: those that count towards the sparsity, and those among them that no linear owns.

Stacks of experts that ``sparsellm.model.experts`` does not know belong to no linear and stay dense, but they count.
Names and shapes alone are read, so no weights need be loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sparsellm.errors import ModelError, RecipeError, some
from sparsellm.model.chain import Chain
from sparsellm.model.structure import LinearView, iterate_linears

DENSE_LIMIT = 0.02  # fraction of a block; routers, convolutions and the like stay below it in published models
_SHOWN = 4  # kinds of parameters that a message names


@dataclass(frozen=True)
class BlockMatrix:
    """One matrix of a block, or a stack of them in one parameter."""

    name: str  # the parameter's, such as model.layers.0.mlp.down_proj.weight
    block: int
    shape: tuple[int, ...]  # as the parameter is stored
    linear: LinearView | None  # that owns it and can be pruned
    shared: bool = False  # with the embedding or the head, which are not pruned

    @property
    def label(self) -> str:
        """The name of the linear, or of the parameter if no linear owns it."""
        if self.linear is None:
            return self.name
        return self.linear.name

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def block_matrices(chain: Chain, index: int) -> list[BlockMatrix]:
    """The matrices of block ``index``, in the order of the model's parameters.

    A matrix is the weight of a linear, a gate, or any other floating-point parameter with two or more dimensions longer
    than one whose name does not end in ``bias``. A parameter used in several places counts in the first block that uses
    it. One that belongs to the embedding or the head is shared with them, and no linear owns it."""
    linears = {linear.weight_name: linear for linear in chain.linears(index)}
    matrices = []
    for inner, parameter in chain.blocks[index].named_parameters():
        name = f"{chain.block_names[index]}.{inner}"
        if chain.home(name)[1] != name:
            continue
        linear = linears.get(name)
        matrix = sum(
            length > 1 for length in parameter.shape
        ) > 1 and not inner.endswith("bias")
        if linear is not None or matrix or name in chain.gates:
            matrices.append(
                BlockMatrix(
                    name, index, tuple(parameter.shape), linear, not chain.owns(name)
                )
            )
    return matrices


def all_matrices(chain: Chain) -> list[BlockMatrix]:
    """``block_matrices`` of every block."""
    return [
        matrix for index in range(len(chain)) for matrix in block_matrices(chain, index)
    ]


def matches(parameter: str, patterns: Iterable[str]) -> bool:
    """Whether a shell pattern (``*`` matches dots too) names a parameter of the model, or a module around it."""
    parts = parameter.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def is_excluded(
    parameter: str, exclude: Iterable[str], only: Sequence[str] = ()
) -> bool:
    """Whether the recipe leaves a parameter dense: ``exclude`` names it, or ``only`` is not empty and does not."""
    return matches(parameter, exclude) or (bool(only) and not matches(parameter, only))


def unmatched_patterns(
    chain: Chain, patterns: Mapping[str, Iterable[str]]
) -> list[str]:
    """Refuses a pattern that matches no matrix of the blocks (RecipeError). Patterns of ``allow_dense`` accept what no
    linear owns, and may match nothing: a warning names each. ``patterns`` are those of the recipe, by field."""
    if any(patterns.values()):
        matrices = all_matrices(chain)
    else:
        matrices = []
    warnings = []
    for field, entries in patterns.items():
        owned = field != "allow_dense"
        names = [matrix.name for matrix in matrices if owned or matrix.linear is None]
        if field == "sparsity_of":  # which is for linears that are pruned
            names = [
                name
                for name in names
                if not is_excluded(name, patterns["exclude"], [*patterns["only"]])
            ]
        kind = "matrix of the blocks"
        if not owned:
            kind = "parameter that is not a linear's"
        like = ""
        if names:
            like = f"; names are like {names[0]!r}"
        missed = [
            pattern
            for pattern in entries
            if not any(matches(name, [pattern]) for name in names)
        ]
        said = [f"{field} {pattern!r} matches no {kind}{like}" for pattern in missed]
        if said and owned:
            raise RecipeError(f"{said[0]}; correct the pattern, or leave it out")
        warnings += said
    return warnings


def outside_blocks(chain: Chain) -> list[str]:
    """A warning that names the linears outside blocks, towers and head, which stay dense and do not count, if they have
    more than ``DENSE_LIMIT`` of the weights of the blocks."""
    inside = tuple(f"{name}." for name in (*chain.block_names, *chain.towers))
    head = chain.model.get_output_embeddings()
    outside = {
        name: module.get_parameter("weight").numel()
        for name, module in iterate_linears(chain.model, "")
        if module is not head and not name.startswith(inside)
    }
    share = sum(outside.values()) / sum(
        matrix.weights for matrix in all_matrices(chain)
    )
    if share <= DENSE_LIMIT:
        return []
    return [
        f"linears outside the blocks stay dense and are not counted: {some(list(outside), _SHOWN)}, as "
        f"many weights as {share:.1%} of the blocks"
    ]


def refuse_silent_dense(
    chain: Chain, accepted: Sequence[str], only: Sequence[str] = ()
) -> None:
    """Refuses a model of which a large part would stay dense although the recipe does not accept that.

    In each block, the matrices that no linear owns, without gates and those that ``accepted`` names or ``only`` does
    not, may be at most ``DENSE_LIMIT`` of the weights. The ModelError has an ``allow_dense`` that accepts them."""
    refused: list[BlockMatrix] = []
    in_block: list[int] = []
    for index in range(len(chain)):
        matrices = block_matrices(chain, index)
        in_block.append(sum(matrix.weights for matrix in matrices))
        dense = [
            matrix
            for matrix in sorted(matrices, key=lambda matrix: -matrix.weights)
            if matrix.linear is None
            and matrix.name not in chain.gates
            and not is_excluded(matrix.name, accepted, only)
        ]
        small = 0
        while dense and small + dense[-1].weights <= DENSE_LIMIT * in_block[index]:
            small += dense.pop().weights  # the smallest ones, which stay within the limit once the others are accepted
        refused += dense
    if not refused:
        return
    first: dict[str, BlockMatrix] = {}  # by kind
    for matrix in refused:
        first.setdefault(kind_of(chain, matrix.name, matrix.block), matrix)
    listed = [
        f"{matrix.name} ({'×'.join(map(str, matrix.shape))}) with {matrix.weights / in_block[matrix.block]:.1%}"
        for matrix in first.values()
    ]
    more = ""
    if len(listed) > _SHOWN:
        more = f", and {len(listed) - _SHOWN} more kinds"
    share = sum(matrix.weights for matrix in refused) / sum(in_block)
    raise ModelError(
        f"these would stay dense, as only linears are pruned: {', '.join(listed[:_SHOWN])} of the weights of the "
        f"block{more}; all {len(refused)} of them are {share:.1%} of the weights of all blocks; to leave them dense "
        f"and prune the rest, set allow_dense={[f'*.{kind}' for kind in first]}"
    )


def kind_of(chain: Chain, name: str, block: int) -> str:
    """The name of a parameter inside its block, with ``*`` for numbers: ``mlp.experts.*.w1.weight``."""
    return re.sub(
        r"(?<=\.)\d+(?=\.|$)", "*", name.removeprefix(f"{chain.block_names[block]}.")
    )
