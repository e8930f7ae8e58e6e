"""The recipe: all settings of a pruning run as one typed model, read from and written to YAML."""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from sparsellm.errors import RecipeError, nearest, shown
from sparsellm.inputs.sizes import parse_bytes
from sparsellm.inputs.yaml_input import dump_yaml, parse_yaml, read_yaml
from sparsellm.patterns import NM, Pattern, Unstructured, parse_chosen, parse_pattern

MOST_TOKENS = 1 << 31  # in all calibration windows together, whose ids alone take 16 GiB
MOST_SEED = (1 << 63) - 1
SWEEP = ("effort", "passes", "sets", "stages", "sweep_rate")  # fields for methods that a sweep may follow


def _whole(value: Any) -> Any:
    """Converts whole numbers, such as ``1e3`` in YAML or numpy's types, to ``int``; a bool stays and is refused."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


def _yes_or_no(value: Any) -> Any:
    """YAML reads ``yes`` and ``no`` as booleans."""
    return ("yes" if value else "no") if isinstance(value, bool) else value


Bos = Annotated[Literal["auto", "yes", "no"], BeforeValidator(_yes_or_no)]


class Recipe(BaseModel):
    """All settings of one pruning run. Unknown keys are refused.

    Types are strict: neither a bool nor a string of digits is accepted as a number.

    Raises:
        RecipeError: a key is unknown (the message has the nearest known one), or a value has the wrong type or range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    method: str = Field(
        "sparsellm", max_length=200, description="How weights are chosen and refitted; `sparsellm methods` lists them."
    )
    sparsity: float = Field(
        0.7,
        description="Fraction of zeros over all pruned linears, from 0 up to, not including, 1; `allocation` divides "
        "them among the linears.",
    )
    values: Literal["keep", "int8", "int4", "int3"] = Field(
        "keep",
        description="Type of the kept values: 'keep' for the checkpoint's own; 'int8', 'int4' or 'int3' to round them, "
        "each making up for the others, to numbers that `sparsellm pack` stores in that type without loss.",
    )
    pattern: str | None = Field(
        None,
        description="N:M: N weights kept of every M consecutive inputs, e.g. '2:4'; 'auto:8' for an N of 8 that the "
        "allocation chooses for each linear, so that `sparsity` is reached.",
    )
    options: dict[str, JsonValue] = Field(default_factory=dict, description="Options of the method, by name.")
    effort: Whole | None = Field(
        None,
        ge=0,
        le=3,
        description="Passes of a sweep over the whole model at the end, for method sparsellm: 0 none, 1 one, 2 three, "
        "3 eight. More passes take longer and lose less. null for the method's default: 1 for sparsellm.",
    )
    passes: Whole | None = Field(None, ge=0, description="Passes of the sweep, as a number; null: by `effort`.")
    sets: Whole | None = Field(
        None,
        ge=1,
        le=8,
        description="Sets of calibration windows that the blocks take in turn; null: 1 without a sweep, 2 with one "
        "pass, 4 with three or more.",
    )
    stages: Whole | None = Field(
        None,
        ge=1,
        le=2,
        description="2: prune to 1.5 times the density and sweep, then prune on; null: 2 from 80 % on with three "
        "passes or more.",
    )
    sweep_rate: float | None = Field(
        None, gt=0, description="Learning rate of the sweep; null: by the divergence at its start."
    )
    allocation: str | None = Field(
        None,
        max_length=200,
        description="How zeros are divided among blocks and linears; `sparsellm methods` lists the allocations. null "
        "for the method's default: 'threshold' for sparsellm, 'uniform' for others and if a pattern is set.",
    )
    allocation_options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Options of the allocation, by name."
    )
    exclude: Annotated[list[str], Field(strict=False)] = Field(
        default_factory=list,
        description="Names of linears, other parameters or modules that stay dense, as shell patterns, e.g. "
        "'*.down_proj' or '*.experts.*'.",
    )
    allow_dense: Annotated[list[str], Field(strict=False)] = Field(
        default_factory=list,
        description="Parameters that no linear owns and that may stay dense, as shell patterns, e.g. '*.conv1d'. "
        "Linears are pruned all the same. Without it, more than 2 % of a block is refused.",
    )
    only: Annotated[list[str], Field(strict=False)] = Field(
        default_factory=list,
        description="Shell patterns as in `exclude`; if there are any, whatever none of them names stays dense.",
    )
    sparsity_of: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict,
        description="Sparsities of some linears, by shell patterns as in `exclude`, e.g. {'*.down_proj': 0.6}; of two "
        "that match, the later one counts. The allocation divides the other zeros, so that `sparsity` is reached.",
    )
    calibration: str = Field(
        "pydoc",
        max_length=5000,
        description="Text to calibrate on: a file, a hub data set or alias, 'self', or 'pydoc'.",
    )
    samples: Whole = Field(128, ge=1, le=MOST_TOKENS // 2, description="Calibration windows.")
    seq_len: Whole | None = Field(
        None,
        ge=2,
        le=MOST_TOKENS,
        description="Tokens in a calibration window; null for 2048, or the limit of the model if that is less.",
    )
    bos: Bos = Field(
        "auto",
        description="Whether every calibration window begins with the tokenizer's beginning-of-text token (BOS): "
        "'auto' where the tokenizer adds it by itself, 'yes', or 'no' for windows cut anywhere, as in the papers.",
    )
    min_tokens_per_expert: Whole = Field(
        1,
        ge=0,
        le=MOST_TOKENS,
        description="Warn of experts of a mixture that fewer calibration tokens than this are routed to. Such experts "
        "are pruned mostly by the statistics of all tokens.",
    )
    batch_tokens: Whole = Field(
        4096,
        ge=1,
        le=MOST_TOKENS,
        description="Calibration tokens in one forward call of a block; more take more memory.",
    )
    memory: str | Whole | None = Field(
        None,
        description="Most resident memory of the whole run, such as '4GiB'; hidden states that do not fit go to disk. "
        "null for a share of the machine's free memory.",
    )
    seed: Whole = Field(0, ge=0, le=MOST_SEED, description="Seed of all random choices.")
    device: str = Field(
        "auto", max_length=200, description="'cpu', 'cuda', 'cuda:1', 'mps', or 'auto' for a GPU if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype in which blocks compute; 'auto' for the stored dtype, or fp32 if the device emulates that. "
        "Weights are always saved in their stored dtype.",
    )

    products: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Dtype of matrix products when fp32 blocks run, forward and backward: 'auto' takes bfloat16 on a "
        "CPU with bf16 units. Solvers that declare it take them too; statistics are always fp32.",
    )

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(_explain(error, type(self))) from None

    @field_validator("sparsity")
    @classmethod
    def _in_range(cls, value: float) -> float:
        if not 0.0 <= value < 1.0:
            raise ValueError("sparsity is the fraction of zeros; give a number from 0 up to, not including, 1")
        return value

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("calibration", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("calibration", "method", "device")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("it is empty; leave the field out for the default")
        return value

    @field_validator("options", "allocation_options")
    @classmethod
    def _can_be_written(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # a long integer, half a surrogate pair, a list in itself
            raise ValueError(f"it cannot be written as JSON ({error})") from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _sparsity_follows_pattern(cls, values: Any) -> Any:
        """Sets ``sparsity`` to the fraction that a pattern implies, so that the recipe does not show a wrong default.

        A pattern or sparsity of another type is left to its field's own validation.
        """
        pattern = values.get("pattern")
        if isinstance(pattern, NM):
            pattern = str(pattern)
        if not isinstance(pattern, str):
            return values
        if parse_chosen(pattern) is not None:
            return {**values, "pattern": pattern}
        implied = parse_pattern(pattern).sparsity
        given = values.get("sparsity")
        if isinstance(given, int | float) and not isinstance(given, bool) and 0 <= given < 1:
            if abs(given - implied) > 1e-9:
                raise RecipeError(f"pattern {pattern} means sparsity {implied:g}, not {shown(given)}; give one of them")
        elif given is not None:
            return {**values, "pattern": pattern}
        return {**values, "pattern": pattern, "sparsity": implied}

    @model_validator(mode="after")
    def _one_of_pattern_and_sparsity_of(self) -> Recipe:
        if self.pattern is not None and self.sparsity_of:
            why = "fixes the sparsity of every linear" if self.chosen_of is None else "divides the zeros itself"
            raise RecipeError(f"pattern {self.pattern} {why}; leave out sparsity_of")
        return self

    @model_validator(mode="after")
    def _chosen_pattern_reaches_sparsity(self) -> Recipe:
        m = self.chosen_of
        if m is not None and (m < 2 or not 1 / m <= self.sparsity <= 1 - 1 / m):
            least = f"from {1 / m:.4g} to {1 - 1 / m:.4g}" if m > 1 else "none at all"
            raise RecipeError(
                f"pattern {self.pattern} cannot reach sparsity {self.sparsity:g}: 1 to {m} - 1 kept of {m} is {least}; "
                "change sparsity or the pattern"
            )
        return self

    @model_validator(mode="after")
    def _tokens_within_limit(self) -> Recipe:
        if self.seq_len is not None and self.samples * self.seq_len > MOST_TOKENS:
            raise RecipeError(
                f"{self.samples} samples of {self.seq_len} tokens are more than {MOST_TOKENS} calibration tokens; "
                "lower samples or seq_len"
            )
        return self

    @model_validator(mode="after")
    def _fixed_patterns_are_uniform(self) -> Recipe:
        if self.chosen_of is not None:
            if self.allocation == "uniform":
                raise RecipeError(
                    f"pattern {self.pattern} leaves every linear's N to the allocation, and uniform chooses none; take "
                    "another allocation, or a pattern such as 4:8"
                )
        elif self.pattern is not None and self.allocation not in (None, "uniform"):
            raise RecipeError(
                f"allocation {self.allocation} cannot go with pattern {self.pattern}, which fixes the sparsity of "
                "every linear; take allocation uniform, or sparsity in place of the pattern"
            )
        return self

    def allocation_by(self, preferred: str) -> str:
        """The allocation that the recipe names; else ``preferred``, or ``uniform`` with a pattern or sparsity 0.

        A pattern with a choice of N needs an allocation: ``threshold`` where ``preferred`` is ``uniform``.
        """
        if self.allocation is not None:
            return self.allocation
        if self.chosen_of is not None:
            return preferred if preferred != "uniform" else "threshold"
        return preferred if self.pattern is None and self.sparsity else "uniform"

    @property
    def chosen_of(self) -> int | None:
        """The M of a pattern with a choice of N for each linear; None for any other pattern."""
        return parse_chosen(self.pattern) if self.pattern else None

    def pattern_of(self, weights: int, zeros: int | None = None) -> Pattern:
        """The pattern of a linear with this number of weights, and with ``zeros`` zeros if an allocation chose them."""
        m = self.chosen_of
        if self.pattern and m is None:
            return parse_pattern(self.pattern)
        zeros = round(self.sparsity * weights) if zeros is None else zeros
        return Unstructured(zeros, weights) if m is None else NM(min(max(m - round(zeros * m / weights), 1), m - 1), m)

    def updated(self, /, **changes: Any) -> Recipe:
        """A copy with some fields changed, checked again."""
        values = {**self.model_dump(), **changes}
        chosen = isinstance(values["pattern"], str) and parse_chosen(values["pattern"]) is not None
        if "pattern" in changes and "sparsity" not in changes and not chosen:
            values.pop("sparsity")
        if "sparsity" in changes and "pattern" not in changes and not chosen:
            values["pattern"] = None
        return Recipe(**values)

    def with_settings(self, settings: list[str]) -> Recipe:
        """Applies ``key=value`` settings; ``options.damping=0.1`` sets an option of the method,
        ``allocation_options.b=0.01`` one of the allocation, and ``sparsity_of.*.up_proj=0.5`` an entry of that field.
        Values are YAML.

        Raises:
            RecipeError: a setting has no ``=`` or no key, one key is set twice, or a key or value does not fit.
        """
        changes: dict[str, Any] = {}
        options: dict[str, dict[str, Any]] = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            key = key.strip()
            field, dot, name = key.partition(".")
            if not equals or not field or (dot and not name):
                raise RecipeError(f"--set {shown(setting)} has no {'key' if equals else repr('=')}; write key=value")
            value = parse_yaml(text, f"the value of --set {shown(setting)}")
            into, entry = (options.setdefault(field, {}), name) if dot and field in _MAPPINGS else (changes, key)
            if entry in into:
                raise RecipeError(f"--set {shown(key)} is given twice; give it once")
            into[entry] = value
        for field, named in options.items():
            whole = changes.get(field, getattr(self, field))
            if field in changes and (not isinstance(whole, dict) or not named.keys().isdisjoint(whole)):
                name = next(iter(named))
                raise RecipeError(f"--set sets {field} to {shown(whole)} and {field}.{name} too; give one of them")
            changes[field] = {**{name: whole[name] for name in whole if name not in named}, **named}
        return self.updated(**changes) if changes else self

    def to_yaml(self) -> str:
        """Every field, each under its description."""
        lines = []
        for name, field in type(self).model_fields.items():
            lines.append(f"# {field.description}")
            lines.append(dump_yaml({name: getattr(self, name)}).rstrip())
        return "\n".join(lines) + "\n"

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Recipe:
        """A recipe from YAML text, if ``source`` is a string, or from a file, if it is a path.

        Raises:
            RecipeError: no such file, not a mapping, or a field does not fit.
        """
        if isinstance(source, str):
            return cls.of(parse_yaml(source, "the recipe"))
        return cls.of(read_yaml(Path(source)))

    @classmethod
    def of(cls, values: Any) -> Recipe:
        """A recipe from a mapping of fields.

        Raises:
            RecipeError: not a mapping of fields, or a field does not fit.
        """
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise RecipeError("the recipe is not a mapping of fields; write lines like 'sparsity: 0.7'")
        return cls(**values)


_MAPPINGS = ("options", "allocation_options", "sparsity_of")


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    key = str(first["loc"][0]) if first["loc"] else "recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown recipe field {shown(key)}; {nearest(key[:100], model.model_fields)}"
    if key in _MAPPINGS and len(first["loc"]) > 1:
        key = f"{key}.{shown(first['loc'][1]).strip(chr(39))}"
    reason = first["msg"].removeprefix("Value error, ")
    if key.startswith("sparsity_of."):
        reason = "give the fraction of zeros, from 0 up to, not including, 1"
    return f"recipe field {key} is {shown(first['input'])}: {reason}"
