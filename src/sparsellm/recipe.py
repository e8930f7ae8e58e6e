"""What to prune and how: one typed model, YAML in and out, every field described."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sparsellm.errors import RecipeError, nearest
from sparsellm.inputs.sizes import parse_bytes
from sparsellm.patterns import Pattern, Unstructured, parse_pattern


class Recipe(BaseModel):
    """All settings of one pruning run. Unknown keys are refused.

    Raises:
        RecipeError: a key is unknown (the nearest known one is offered), or a value has the wrong type or range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field("sparsellm", description="How weights are chosen and refitted; `sparsellm methods` lists them.")
    sparsity: float = Field(
        0.7,
        description="Fraction of zeros over all pruned linears, from 0 up to, not including, 1; `allocation` says "
        "which gives how much.",
    )
    pattern: str | None = Field(None, description="N:M: N weights kept of every M consecutive inputs, e.g. '2:4'.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the method, by name.")
    allocation: str | None = Field(
        None,
        description="How much each block and each linear gives; `sparsellm methods` lists the ways. null for the "
        "method's own: 'threshold' of sparsellm, 'uniform' of the others and wherever a pattern fixes the sparsity.",
    )
    allocation_options: dict[str, Any] = Field(default_factory=dict, description="Options of the allocation, by name.")
    exclude: list[str] = Field(
        default_factory=list,
        description="What to leave dense: shell patterns over the names of linears, of other parameters, and of the "
        "modules that hold them, e.g. '*.down_proj' or '*.experts.*'.",
    )
    calibration: str = Field(
        "pydoc", description="Text to calibrate on: a file, a hub data set or alias, 'self', or 'pydoc'."
    )
    samples: int = Field(128, ge=1, description="Calibration windows.")
    seq_len: int | None = Field(
        None, ge=2, description="Tokens in a calibration window; null for 2048, or what the model can take if less."
    )
    batch_tokens: int = Field(
        4096, ge=1, description="Calibration tokens in one forward call of a block; more needs more memory."
    )
    memory: str | int | None = Field(
        None,
        description="Most resident memory of the whole run, such as '4GiB'; hidden states that do not fit go to disk. "
        "null for a share of what the machine has free.",
    )
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn at random.")
    device: str = Field("auto", description="'cpu', 'cuda', 'cuda:1', 'mps', or 'auto' for a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="What blocks compute in; 'auto' for the stored dtype, or fp32 where the device emulates it. "
        "Weights are always saved in the dtype they came in.",
    )

    products: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="What blocks in fp32 multiply in when they only run: 'bfloat16' is several times as fast on CPUs "
        "with bf16 units. Statistics and solvers are always fp32.",
    )
    read_ahead: bool | None = Field(
        None,
        description="Read the next block in a thread while this one is solved; takes the memory of it as well. "
        "null for where that pays: with a GPU.",
    )

    def __init__(self, **values: Any) -> None:
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

    @model_validator(mode="before")
    @classmethod
    def _sparsity_follows_pattern(cls, values: Any) -> Any:
        """The fraction that a pattern implies stands in the recipe, so that no reader is misled by a default."""
        if isinstance(values, dict) and values.get("pattern") is not None:
            text = str(values["pattern"])
            implied = parse_pattern(text).sparsity
            given = values.get("sparsity")
            if given is not None and abs(float(given) - implied) > 1e-9:
                raise RecipeError(f"pattern {text} means sparsity {implied:g}, not {given}; give one of them")
            return {**values, "pattern": text, "sparsity": implied}
        return values

    @model_validator(mode="after")
    def _fixed_patterns_are_uniform(self) -> Recipe:
        if self.pattern is not None and self.allocation not in (None, "uniform"):
            raise RecipeError(
                f"allocation {self.allocation} cannot go with pattern {self.pattern}, which fixes the sparsity of "
                "every linear; take allocation uniform, or sparsity in place of the pattern"
            )
        return self

    def allocation_by(self, preferred: str) -> str:
        """The one that is named; else ``preferred``, or ``uniform`` where a pattern or sparsity 0 leaves no choice."""
        if self.allocation is not None:
            return self.allocation
        return preferred if self.pattern is None and self.sparsity else "uniform"

    def weight_pattern(self) -> Pattern:
        """The pattern every pruned linear gets before allocation."""
        return parse_pattern(self.pattern) if self.pattern else Unstructured(self.sparsity)

    def updated(self, **changes: Any) -> Recipe:
        """A copy with some fields changed, checked again."""
        values = {**self.model_dump(), **changes}
        if "pattern" in changes and "sparsity" not in changes:
            values.pop("sparsity")
        if "sparsity" in changes and "pattern" not in changes:
            values["pattern"] = None
        return Recipe(**values)

    def with_settings(self, settings: list[str]) -> Recipe:
        """Applies ``key=value`` settings; ``options.damping=0.1`` sets an option of the method, and
        ``allocation_options.b=0.01`` one of the allocation. Values are YAML.

        Raises:
            RecipeError: a setting has no ``=``, or its key or value does not fit.
        """
        changes: dict[str, Any] = {}
        mappings = {"options": dict(self.options), "allocation_options": dict(self.allocation_options)}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise RecipeError(f"--set {setting!r} has no '='; write key=value")
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError:
                raise RecipeError(f"--set {setting!r}: {text!r} is not valid YAML") from None
            field, dot, name = key.partition(".")
            if dot and field in mappings:
                mappings[field][name] = value
            else:
                changes[key] = value
        for field, options in mappings.items():
            if options != getattr(self, field):
                changes[field] = {**options, **changes.get(field, {})}
        return self.updated(**changes) if changes else self

    def to_yaml(self) -> str:
        """Every field, each under its description."""
        lines = []
        for name, field in type(self).model_fields.items():
            lines.append(f"# {field.description}")
            lines.append(yaml.safe_dump({name: getattr(self, name)}, sort_keys=False).rstrip())
        return "\n".join(lines) + "\n"

    @classmethod
    def from_yaml(cls, source: str | Path) -> Recipe:
        """A recipe from YAML text or from a file.

        Raises:
            RecipeError: no such file, not a mapping, or a field does not fit.
        """
        if isinstance(source, Path):
            try:
                text = source.read_text(encoding="utf-8")
            except OSError as error:
                raise RecipeError(f"cannot read recipe {source}: {error.strerror}") from None
        else:
            text = source
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe is not valid YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise RecipeError("the recipe is not a mapping of fields; write lines like 'sparsity: 0.7'")
        return cls(**values)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] == "extra_forbidden":
        return f"unknown recipe field {key!r}; {nearest(key, model.model_fields)}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"recipe field {key} is {first['input']!r}: {reason}"
