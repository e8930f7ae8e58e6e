"""The recipe: every setting of a pruning run once, with its type, limits, default, help text and command-line option.

Importing this module imports no torch, so that ``--help`` and shell completion are fast.
"""

from __future__ import annotations

import inspect
import json
import math
import numbers
import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
)
from pydantic.functional_validators import field_validator, model_validator

from sparsellm.errors import RecipeError, nearest, refusal, shown
from sparsellm.inputs import (
    as_number,
    as_whole_number,
    check_size,
    dump_yaml,
    parse_bytes,
    parse_yaml,
    read_yaml,
    without_folders,
)
from sparsepack.arguments import SHORT_DTYPES
from sparsepack.grids import GRIDS, Grid

if TYPE_CHECKING:
    from sparsellm.patterns import Pattern

# in all calibration windows together, whose ids alone take 16 GiB
MOST_TOKENS = 1 << 31
MOST_SEED = (1 << 63) - 1
# share of zeros at which `threshold` says how many bytes a linear gets
NOTIONAL = 0.3
# fields for methods that a sweep may follow
SWEEP = (
    "effort",
    "sweep_tokens",
    "passes",
    "sets",
    "sweep_rate",
)

# A shell completes these, and the devices.
SOURCES = (
    "c4-sample",
    "pydoc",
    "pycode",
    "self",
    "wikitext2",
    "ptb",
    "c4",
    "hub:",
)
DEVICES = ("cpu", "cuda", "auto")
# The panels of --help.
WHAT = "What to prune"
CALIBRATION = "Calibration"
RESOURCES = "Resources"
ALLOCATION = "threshold with sparsellm, else uniform"
EFFORT = "1 for sparsellm; the other methods have no sweep"
SEQ_LEN = "2048, or the limit of the model"
TEXT = "c4-sample; pydoc for the demo, or where the hub cannot be reached"  # these four: what None means


@dataclass(frozen=True)
class Option:
    """How the option of a field looks on the command line."""

    panel: str  # group in ``--help``
    metavar: str  # placeholder for the value
    flag: str = ""  # its name; "" for the field's name with dashes
    null: str = ""  # meaning of None, shown as the default
    values: tuple[str, ...] = ()  # completed by a shell; a ``Literal`` needs none
    # subpackages whose registered names a shell completes
    registered: tuple[str, ...] = ()


def _integer(value: Any) -> Any:
    """``int`` for whole numbers, such as ``1e3`` in YAML or numpy's types; a bool stays and is refused."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _size(value: str | int | None) -> str | int | None:
    if value is not None:
        parse_bytes(value)
    return value


def _tokens(value: Any) -> Any:
    """The number that ``256k``, ``1M`` or the text of a command line means."""
    if not isinstance(value, str):
        return _integer(value)
    match = re.fullmatch(r"(\d{1,12})([kKM]?)", value.strip())
    if match is None:
        raise RecipeError(
            f"number of tokens {shown(value)} is unknown; write a whole number such as 16384, 256k or 1M"
        )
    return int(match[1]) * {"": 1, "K": 1000, "M": 10**6}[match[2].upper()]


def _divergence(value: Any) -> Any:
    """The divergence, if it is a name that is known or a positive number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value in (None, "Q4_K_M") or (number and 0 < value < math.inf):
        return value
    raise RecipeError(
        f"divergence {shown(value)} is unknown; give Q4_K_M, or nats a token above 0"
    )


Integer = Annotated[int, BeforeValidator(_integer)]
Tokens = Annotated[int, BeforeValidator(_tokens), Field(ge=1, le=MOST_TOKENS)]
Bos = Annotated[
    Literal["auto", "yes", "no"],  # YAML reads ``yes`` and ``no`` as booleans
    BeforeValidator(
        lambda value: ("yes" if value else "no") if isinstance(value, bool) else value
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    BeforeValidator(
        lambda value: (
            SHORT_DTYPES.get(value, value) if isinstance(value, str) else value
        )
    ),
]
Globs = Annotated[list[str], Field(strict=False)]
NAME = Field(min_length=1, max_length=200)
Source = Annotated[
    str,
    BeforeValidator(
        lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value
    ),
    Field(min_length=1, max_length=5000),
]


class Recipe(BaseModel):
    """All settings of one pruning run. An unknown key (the message has the nearest known one), and a value of the wrong
    type or range, is a RecipeError. Neither a bool nor a string of digits is accepted as a number."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    method: Annotated[
        str, Option(WHAT, "NAME", registered=("method/blocks", "method/solvers")), NAME
    ] = "sparsellm"
    """How weights are chosen and refitted."""
    sparsity: Annotated[float, Option(WHAT, "SHARE"), Field(ge=0, lt=1)] = 0.5
    """Fraction of zeros over all pruned linears, at least 0 and below 1, which the allocation divides among them."""
    pattern: Annotated[str | None, Option(WHAT, "N:M")] = None
    """Keep N of every M consecutive inputs, such as 2:4."""
    values: Annotated[
        Literal["keep", "int8", "int6", "int5", "int4", "int3", "mixed"],
        Option(WHAT, "TYPE", values=("keep", "int8", "int6", "int5", "int4", "int3")),
    ] = "keep"
    """Type of the kept values: keep for the checkpoint's own; int8, int6, int5, int4 or int3 to round them while
    pruning, so that `sparsellm pack` stores them without loss."""
    grid: Annotated[
        Literal["own", *GRIDS],  # type: ignore[valid-type]
        Option(WHAT, "NAME"),
    ] = "own"
    """Grid to which values are rounded: own (that of `sparsellm pack`), or one that another program runs without loss:
    q4_0, q8_0, q6_k, q5_0, iq4_nl, iq4_xs, q3_k, q2_k and q4_k (GGUF), w4a16, w4a16-64, w4a16-32, w3a16, w8a16 and w8a8
    (compressed-tensors). It implies the values, and sparsity 0 unless one is given, since zeros save nothing there."""
    bits: Annotated[float | None, Field(gt=0, le=16)] = None
    """Most bits of a weight, on average over the pruned linears, as `program` stores them, with masks and scales. Every
    linear gets a type and a sparsity of its own; this implies values mixed, and no sparsity is given."""
    size: Annotated[int | None, Field(gt=0)] = None
    """Most bytes of the pruned linears, embedding and output head together, in place of `bits`: all get types of
    llama.cpp, which alone has this. The checkpoint must be on disk."""
    divergence: Annotated[
        Literal["Q4_K_M"] | float | None, BeforeValidator(_divergence)
    ] = None
    """Most divergence from the dense model, in place of `bits`: nats a token, or Q4_K_M for that of llama.cpp's
    file of this kind. A quick pass on held-out windows before the run finds the smallest size with it."""
    program: Literal["sparsellm", "llama.cpp", "vllm"] | None = None
    """The program whose types linears get with `bits` or `divergence`: sparsellm (the packed format), llama.cpp or
    vllm."""
    options: dict[str, JsonValue] = {}
    """Options of the method, by name."""
    allocation: Annotated[
        str | None,
        Option(WHAT, "NAME", null=ALLOCATION, registered=("method/allocation",)),
        NAME,
    ] = None
    """How the zeros are divided among blocks and linears. A pattern needs none."""
    allocation_options: dict[str, JsonValue] = {}
    """Options of the allocation, by name."""
    experts: Annotated[
        float | None, Option(WHAT, "SHARE", null="keep all"), Field(gt=0, le=1 << 20)
    ] = None
    """Experts of each mixture to remove before anything else: below 1 the share to remove, such as 0.5; from 1 on the
    number to keep. With sparsity 0, nothing else is pruned."""
    expert_score: Annotated[
        str, Option(WHAT, "NAME", registered=("method/experts",)), NAME
    ] = "coordinated"
    """How experts to keep are chosen."""
    expert_options: dict[str, JsonValue] = {}
    """Options of the expert score, by name."""
    expert_refit: bool = True
    """Whether the experts that stay are refitted to the output of the dense mixture."""
    only: Annotated[Globs, Option(WHAT, "GLOB")] = []
    """Linears to prune, as shell patterns such as '*.mlp.*'; all others stay dense."""
    exclude: Annotated[Globs, Option(WHAT, "GLOB", flag="--skip")] = []
    """Linears, other parameters or modules that stay dense, as shell patterns such as '*.down_proj'."""
    sparsity_of: Annotated[
        dict[str, Annotated[float, Field(ge=0, lt=1)]], Option(WHAT, "GLOB=SHARE")
    ] = {}
    """Sparsity of the linears that a shell pattern such as '*.down_proj' matches; where several match, the last counts.
    All other linears make up for it, so that the total sparsity is the one asked for."""
    allow_dense: Annotated[Globs, Option(WHAT, "GLOB")] = []
    """Parameters that no linear owns and that may stay dense, as shell patterns such as '*.conv1d'. Without it, more
    than 2 % of a block is refused."""
    effort: Annotated[
        Integer | None, Option(WHAT, "0-3", null=EFFORT), Field(ge=0, le=3)
    ] = None
    """Passes of the sweep over all blocks at the end: 0 none, 1 one, 2 three, 3 eight. More take longer, lose less."""
    sweep_tokens: Annotated[
        Tokens | None, Option(WHAT, "TOKENS", null="as many as `effort` takes")
    ] = None
    """Tokens the sweep trains on, such as 256k or 1M: unused text first, then the same again. It replaces `effort`."""
    passes: Annotated[Integer | None, Field(ge=0, le=1000)] = None
    """Passes of the sweep, after each of which the model is judged and saved; null: by `effort` or `sweep_tokens`."""
    sets: Annotated[Integer | None, Field(ge=1, le=8)] = None
    """Sets of windows that the blocks take in turn; null: 1 without a sweep, 2 with one pass or two, 4 with more."""
    sweep_rate: Annotated[float | None, Field(gt=0, le=1)] = None
    """Learning rate of the sweep; null: by the divergence at its start."""
    calibration: Annotated[
        Source | None, Option(CALIBRATION, "SOURCE", null=TEXT, values=SOURCES)
    ] = None
    """Text to calibrate on: a .txt, .jsonl or .parquet file, c4-sample (a part of C4, from the hub), wikitext2, ptb,
    c4, hub:OWNER/NAME, self (the model writes it), pydoc (Python's documentation), or pycode (its standard
    library); or a text mixture with shares of the windows, such as wiki.txt:0.5,code.jsonl:0.3,self:0.2."""
    samples: Annotated[
        Integer, Option(CALIBRATION, "N"), Field(ge=1, le=MOST_TOKENS // 2)
    ] = 128
    """Calibration windows."""
    seq_len: Annotated[
        Integer | None,
        Option(CALIBRATION, "N", null=SEQ_LEN),
        Field(ge=2, le=MOST_TOKENS),
    ] = None
    """Tokens in a window."""
    seed: Annotated[Integer, Option(CALIBRATION, "N"), Field(ge=0, le=MOST_SEED)] = 0
    """Seed of all random choices."""
    bos: Annotated[Bos, Option(CALIBRATION, "WHEN")] = "auto"
    """Whether every window begins with the tokenizer's beginning-of-text token: auto (where the tokenizer adds it by
    itself), yes, or no (windows cut anywhere, as in the papers)."""
    min_tokens_per_expert: Annotated[
        Integer, Option(CALIBRATION, "N"), Field(ge=0, le=MOST_TOKENS)
    ] = 1
    """Warn of experts that get fewer calibration tokens."""
    batch_tokens: Annotated[Integer, Field(ge=1, le=MOST_TOKENS)] = 4096
    """Calibration tokens in one forward call of a block; more take more memory."""
    memory: Annotated[
        str | Integer | None,
        AfterValidator(_size),
        Option(RESOURCES, "SIZE", null="80 % of the free memory"),
    ] = None
    """Most memory of the run, such as 4GiB; hidden states beyond it go to disk."""
    device_memory: Annotated[
        str | Integer | None,
        AfterValidator(_size),
        Option(RESOURCES, "SIZE", null="90 % of the GPU's free memory"),
    ] = None
    """Most memory of the run on a GPU, such as 20GiB; hidden states beyond it are in the machine's memory."""
    device: Annotated[str, Option(RESOURCES, "NAME", values=DEVICES), NAME] = "auto"
    """cpu, cuda, cuda:1, or auto for a GPU if there is one."""
    dtype: Annotated[Dtype, Option(RESOURCES, "NAME")] = "auto"
    """Dtype in which blocks compute: float32, bfloat16, float16, or auto: the stored one, but float32 for float16,
    and for bfloat16 where it is not native. Weights are saved in their stored dtype; a .gguf file becomes bfloat16, or
    float32 if that is given."""
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products when fp32 blocks run, forward and backward; auto takes bfloat16 on a CPU or GPU with
    bf16 units. Solvers that declare it take them too; statistics are always fp32."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(_explain(error)) from None

    @field_validator(
        "options", "allocation_options", "expert_options", "sparsity_of", mode="before"
    )
    @classmethod
    def _is_small(cls, value: Any) -> Any:
        check_size(value)
        return value

    @field_validator("options", "allocation_options", "expert_options")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (
            ValueError,
            RecursionError,
        ) as error:  # a long integer, half a surrogate pair, a list in itself
            raise ValueError(f"it cannot be written as JSON ({error})") from None
        return value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Recipe:
        """Refuses contradictions, and sets what a size, a pattern or a grid implies, so that the recipe shows no wrong
        default."""
        self._size_decides()
        if self.pattern is not None:
            self._take_pattern()
        if self.grid != "own":
            self._take_grid(GRIDS[self.grid])
        if self.seq_len is not None and self.samples * self.seq_len > MOST_TOKENS:
            many = f"{self.samples} samples of {self.seq_len} tokens are more than {MOST_TOKENS} calibration tokens"
            raise RecipeError(f"{many}; lower samples or seq_len")
        if self.experts is not None and self.experts > 1 and self.experts % 1:
            raise RecipeError(
                f"experts {self.experts:g} is neither a share below 1 nor a whole number to keep"
            )
        return self

    def _size_decides(self) -> None:
        """Sets what a size and its program imply, and refuses what they leave no choice of."""
        sizes = []
        if self.bits is not None:
            sizes.append(f"bits {self.bits:g}")
        if self.size is not None:
            sizes.append(f"size {self.size}")
        if self.divergence is not None:
            sizes.append(f"divergence {self.divergence}")
        if len(sizes) > 1:
            raise RecipeError(
                f"{' and '.join(sizes)} all decide how small the model is; give one"
            )
        sized = bool(sizes)
        if sized != (self.program is not None):
            raise RecipeError(
                "a size (bits, size or divergence) and program go together; give both or none"
            )
        if self.size is not None and self.program != "llama.cpp":
            raise RecipeError(
                f"size {self.size} is of llama.cpp's types, and program is {self.program}; give bits"
            )
        if not sized:
            if self.values == "mixed":
                raise RecipeError(
                    "values mixed comes from a size; give bits and program"
                )
            return
        size = sizes[0]
        implied = {
            "values": "mixed",
            # where threshold's gradients are taken; only the packed format gains by zeros
            "sparsity": NOTIONAL if self.program == "sparsellm" else 0.0,
            "grid": "own",
            "pattern": None,
            "sparsity_of": {},
        }
        for name, value in implied.items():
            given = getattr(self, name)
            if name in self.model_fields_set and given != value:
                raise RecipeError(
                    f"{size} chooses zeros and types by linear, and {name} {given} says otherwise; give one"
                )
            object.__setattr__(self, name, value)
        if self.allocation not in (None, "threshold"):
            raise RecipeError(
                f"{size} takes allocation threshold, not {self.allocation}; leave it out"
            )

    def _take_pattern(self) -> None:
        """Sets the sparsity of the pattern, and refuses what contradicts it."""
        pattern = f"pattern {self.pattern}"
        implied = self.pattern_of(1).sparsity
        given = "sparsity" in self.model_fields_set
        if given and abs(self.sparsity - implied) > 1e-9:
            raise RecipeError(
                f"{pattern} means sparsity {implied:g}, not {self.sparsity:g}; give one"
            )
        object.__setattr__(self, "sparsity", implied)
        if self.sparsity_of:
            raise RecipeError(
                f"{pattern} fixes the sparsity of every linear; leave out sparsity_of"
            )
        if self.allocation not in (None, "uniform"):
            both = f"allocation {self.allocation} cannot go with {pattern}, which fixes the sparsity of every linear"
            raise RecipeError(f"{both}; leave out one")

    def _take_grid(self, grid: Grid) -> None:
        """Sets what a grid implies, and refuses what contradicts it."""
        if "values" in self.model_fields_set and self.values != grid.values:
            raise RecipeError(
                f"grid {self.grid} means values {grid.values}, not {self.values}; give one"
            )
        object.__setattr__(self, "values", grid.values)
        given = "sparsity" in self.model_fields_set and self.sparsity > 0
        if (given or self.pattern or self.sparsity_of) and not grid.has_zero:
            raise RecipeError(
                f"grid {self.grid} does not have the number 0 in every linear, so zeros would not stay; leave out "
                "sparsity and pattern, or take another grid"
            )
        if self.pattern is None and "sparsity" not in self.model_fields_set:
            object.__setattr__(self, "sparsity", 0.0)

    @property
    def rounding(self) -> str:
        """What values are rounded to: ``keep``, an integer type of the packed format, or another program's grid; or
        ``mixed`` where each linear gets one of its own."""
        return self.values if self.grid == "own" else self.grid

    def allocation_by(self, preferred: str) -> str:
        """The allocation that the recipe names. If it names none: ``uniform`` for a pattern or sparsity 0, else
        ``preferred``."""
        if self.allocation is not None:
            return self.allocation
        if self.program is not None:
            return "threshold"
        varies = self.pattern is None and self.sparsity
        return preferred if varies else "uniform"

    @property
    def named(self) -> Recipe:
        """The recipe for files that leave this machine: its text by name, without folders."""
        if self.calibration is None:
            return self
        return self.updated(calibration=without_folders(self.calibration))

    def pattern_of(self, weights: int, zeros: int | None = None) -> Pattern:
        """The pattern of a linear with this number of weights, and with ``zeros`` zeros if an allocation chose them."""
        from sparsellm.patterns import Unstructured, parse_pattern

        if self.pattern is not None:
            return parse_pattern(self.pattern)
        if zeros is None:
            zeros = round(self.sparsity * weights)
        return Unstructured(zeros, weights)

    def updated(self, /, **changes: Any) -> Recipe:
        """A copy with some fields changed, checked again. If a changed field excludes one that is not changed (a fixed
        pattern and sparsity, a grid and values, ways to give the sweep's length), the latter is as if not given."""
        # What a field implies is implied again.
        values = {**self.model_dump(exclude_unset=True), **changes}
        pairs = [("pattern", "sparsity")]
        if self.grid != "own" or values.get("grid", "own") != "own":
            pairs.append(("grid", "values"))
        # Where two exclude each other, a change of one removes the other.
        for pair in pairs:
            for one, other in (pair, pair[::-1]):
                if one in changes and other not in changes:
                    values.pop(other, None)
        for ways in ({"effort"}, {"sweep_tokens", "passes"}):  # to give its length
            if any(changes.get(name) is not None for name in ways):
                others = {"effort", "sweep_tokens", "passes"} - ways
                for name in others - changes.keys():
                    values.pop(name, None)
        return Recipe(**values)

    def with_settings(self, settings: list[str], /, **changes: Any) -> Recipe:
        """A copy with ``changes``, then ``key=value`` settings in order, in YAML, such as ``options.damping=0.1``."""
        for setting in settings:
            key, equals, text = setting.partition("=")
            field, dot, name = (part.strip() for part in key.partition("."))
            if not equals or not field or (dot and not name):
                raise RecipeError(
                    f"setting {shown(setting)} has no {'key' if equals else repr('=')}; write key=value"
                )
            if text.lstrip().startswith("*"):
                such = f"{key}=['{text.strip()}']"
                raise RecipeError(
                    f"setting {shown(setting)} begins its value with *, which YAML takes for an alias; write {such}"
                )
            value = parse_yaml(text, f"the value of setting {shown(setting)}")
            if dot and field in MAPPINGS:
                entries = changes.setdefault(field, dict(getattr(self, field)))
                if isinstance(entries, dict):
                    # the entry goes last: in ``sparsity_of``, the later one counts
                    entries.pop(name, None)
                    entries[name] = value
            else:
                changes[f"{field}{dot}{name}"] = value
        if changes:
            return self.updated(**changes)
        return self

    def to_yaml(self) -> str:
        """Every field, each under its description."""
        text = ""
        for name, value in self:
            option = option_of(name)
            text += f"# {help_of(name)}"
            if option and option.null:
                text += f" null: {option.null}."
            text += "\n" + dump_yaml({name: value})
        return text

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Recipe:
        """A recipe from YAML text, if ``source`` is a string, or from a file, if it is a path."""
        if isinstance(source, str):
            values = parse_yaml(source, "the recipe")
        else:
            values = read_yaml(source)
        if not isinstance(values, Mapping):
            raise RecipeError(
                "the recipe is not a mapping of fields; write lines like 'sparsity: 0.5'"
            )
        return cls.of(values)

    @classmethod
    def of(cls, given: Any) -> Recipe:
        """A recipe from a recipe, a mapping of its fields, the path of a YAML file, or None for the defaults."""
        if given is None or isinstance(given, Recipe):
            return given or cls()
        if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
            return cls(**given)
        if isinstance(given, str | os.PathLike):
            return cls.from_yaml(Path(given))
        raise RecipeError(
            f"recipe is {shown(given)}; give a mapping of fields, or the path of a file with such lines"
        )


def _short_type(annotation: Any) -> str:
    """The type of a field in one word or two, such as ``float | None``."""
    if annotation is None or annotation is type(None):
        return "None"
    origin = get_origin(annotation)
    parts = get_args(annotation)
    if origin is Annotated:
        return _short_type(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_short_type, parts)))
    if origin is list:
        return f"list[{_short_type(parts[0])}]"
    if origin is dict:
        return f"dict[str, {'float' if 'float' in str(parts[1]) else 'Any'}]"
    return getattr(annotation, "__name__", str(annotation))


def _describe(kind: type[BaseModel]) -> None:
    """Makes ``help()`` of a model of settings readable: a short signature, and each field with its sentence."""
    parameters = []
    lines = []
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        short = _short_type(field.annotation)
        kind.__annotations__[name] = short
        parameters.append(
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=short)
        )
        lines.append(f"\n{name}: {short} = {default!r}")
        told = " ".join(str(field.description).split())
        lines += textwrap.wrap(
            told, 92, initial_indent="    ", subsequent_indent="    "
        )
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), *lines])
    kind.__signature__ = Signature(parameters)  # type: ignore[misc]


_describe(Recipe)

# their entries are set after a dot
MAPPINGS = (
    "options",
    "allocation_options",
    "expert_options",
    "sparsity_of",
)


def option_of(name: str) -> Option | None:
    """The command-line option of a field; None for a field that only ``--set`` reaches."""
    return next(
        (
            mark
            for mark in Recipe.model_fields[name].metadata
            if isinstance(mark, Option)
        ),
        None,
    )


def help_of(name: str) -> str:
    """The description of a field, in one line."""
    return " ".join(str(Recipe.model_fields[name].description).split())


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    key = "recipe"
    if first["loc"]:
        key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"unknown recipe field {shown(key)}; {nearest(key[:100], Recipe.model_fields)}"
    if key in MAPPINGS and len(first["loc"]) > 1:
        key = f"{key}.{shown(str(first['loc'][1]))[1:-1]}"
    value = first["input"]
    if first["type"] == "list_type":
        return f"recipe field {key} is {shown(value)}; write a list, such as {key}=['*.mlp.*']"
    if first["type"] == "dict_type":
        return f"recipe field {key} is {shown(value)}; write {key}.NAME=VALUE"
    if isinstance(value, str) and first["type"] in ("float_type", "int_type"):
        hint = as_number if first["type"] == "float_type" else as_whole_number
        return f"recipe field {key} is {shown(value)}; {hint(value)}"
    said = refusal(error, f"recipe field {key}")
    number = isinstance(value, int | float)
    if key.startswith("sparsity") and number and 5 <= value < 100:
        said += f"; did you mean {value / 100:g}?"
    return said
