"""Warnings of what a run's text, model and settings do, which are said before the work."""

from __future__ import annotations

import torch

from sparsellm.errors import some
from sparsellm.method.sweep.training import LEAST_STEPS
from sparsellm.method.sweep.whole_model import STEP_TOKENS
from sparsellm.model import Chain
from sparsellm.model.matrices import is_excluded
from sparsellm.model.structure import LinearView
from sparsellm.recipe import Recipe
from sparsellm.run.calibration import Windows
from sparsellm.run.choice import Choice
from sparsellm.run.counts import pruned_share
from sparsellm.run.opening import Models
from sparsepack.grids import GRIDS, grid_for

_SHOWN = 3  # linears that a warning names
# with fewer calibration tokens the gain over local methods is small
FEW_TOKENS = 32_000


def without_effect(recipe: Recipe, choice: Choice, *, teacher: bool) -> list[str]:
    """Warnings of settings that change nothing because no sweep follows."""
    warnings = []
    # the teacher of a model with fewer experts is not the user's choice
    if teacher and not choice.passes and recipe.experts is None:
        warnings.append(
            "no sweep follows, so the teacher changes no weight; it is what the report compares with"
        )
    if recipe.sweep_rate is not None and not choice.passes:
        warnings.append(
            "no sweep follows, so sweep_rate changes nothing; leave it out, or give an effort"
        )
    return warnings


def stored_otherwise(chain: Chain, recipe: Recipe, *, trust: bool) -> list[str]:
    """Warnings of blocks that compute in fp32 on a GPU, where their weights are stored in half precision, of weights
    that are rounded when they are stored, of a grid that no export takes, and of code that the result lacks."""
    warnings = []
    linears = [linear for index in range(len(chain)) for linear in chain.linears(index)]
    stored = {linear.storage_dtype for linear in linears}
    kinds = {str(dtype).removeprefix("torch.") for dtype in stored}
    wider = (
        chain.device.type == "cuda"
        and chain.dtype == torch.float32
        and kinds <= {"float16", "bfloat16"}
    )
    if wider and recipe.dtype == "auto":
        why = "for which this GPU has no units"
        if "float16" in kinds:
            why = "whose largest number is 65504"
        kept = f"their weights are stored in {' and '.join(sorted(kinds))}, {why}"
        warnings.append(f"blocks compute in float32: {kept}")
    if trust and getattr(chain.config, "auto_map", None):
        warnings.append(
            "code that came with the model is not copied; copy it into the result, which needs it to load"
        )
    if recipe.grid != "own" and recipe.sparsity:
        saves = (
            f"grid {recipe.grid} stores zeros like other values, so they save nothing"
        )
        warnings.append(f"{saves}; sparsity 0 loses less")
    if recipe.grid != "own":
        pruned = [
            linear
            for linear in linears
            if not is_excluded(linear.weight_name, recipe.exclude, recipe.only)
        ]
        parts = [
            part.name
            for part in pruned
            if part.weight_name in chain.parts or chain.is_shared(part.weight_name)
        ]
        # that of GGUF
        turned = [
            part.name
            for part in pruned
            if part.transposed and not GRIDS[recipe.grid].half
        ]
        whys = [f"{name} has no tensor of its own; exclude it" for name in parts]
        whys += [
            f"{name} is a Conv1D, which only GGUF has; take q4_0 or q8_0"
            for name in turned
        ]
        warnings += [f"no export takes grid {recipe.grid}: {why}" for why in whys[:1]]
        warnings += _narrow(pruned, recipe.grid)
    finest = min(stored, key=lambda dtype: torch.finfo(dtype).eps)
    if (
        recipe.dtype != "auto"
        and torch.finfo(chain.dtype).eps > torch.finfo(finest).eps
    ):
        stays = f"kept weights are rounded to {chain.dtype}, and stored in {finest}"
        warnings.append(
            f"{stays.replace('torch.', '')}; leave dtype out to keep their bits"
        )
    return warnings


def _narrow(linears: list[LinearView], name: str) -> list[str]:
    """A warning that names the linears whose rows are too narrow for a grid, and the grid that they take."""
    others = {
        linear.name: other
        for linear in linears
        if (other := grid_for(name, linear.in_features).name) != name
    }
    if not others:
        return []
    other = next(iter(others.values()))
    few = f"{len(others)} of {len(linears)} linears have inputs that {GRIDS[name].columns} does not divide"
    return [
        f"{few}, and are rounded to {other}, as llama.cpp does: {some([*others], _SHOWN)}"
    ]


def short_text(windows: Windows, choice: Choice) -> list[str]:
    """Warnings of few calibration tokens, and of too few windows for the sets and the sweep."""
    warnings = []
    tokens = windows.first.numel()
    known = (
        not windows.suffices(windows.fresh)
        or windows.by_pass[0].numel() < LEAST_STEPS * STEP_TOKENS
    )
    if choice.passes and known:
        fitted = "the sweep has too few windows of its own, so its divergence is on some that weights were fitted to"
        warnings.append(f"{fitted}; `sparsellm eval` measures it on others")
    if windows.bos == "given":
        return warnings
    if tokens < FEW_TOKENS:
        few = f"{tokens} calibration tokens are few; from {FEW_TOKENS} on the model loses less"
        warnings.append(f"{few} (--samples, --seq-len)")
    if len(windows.sets) < choice.sets:
        room = f"the calibration text has room for {len(windows.sets)} of {choice.sets} sets of windows (sets)"
        warnings.append(f"{room}; a longer text gives a better model")
    return warnings


def already_pruned(model: Models, recipe: Recipe) -> list[str]:
    """A warning if the model was pruned before; next to a teacher, only if zeros may get values again."""
    zeros = pruned_share(model.chain, model.start)
    fewer = recipe.pattern is not None or recipe.sparsity < zeros
    if not zeros or not (model.start is None or fewer):
        return []
    where = f"{zeros:.1%} of the weights of a block are zero"
    said = f"the model is already pruned: {where}; where a linear or a group is to have fewer, some get values again"
    return [said]
