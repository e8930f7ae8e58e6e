"""The model card: ``README.md`` of a checkpoint, from its ``pruning.json`` and ``results.json``."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

from sparsellm.errors import StorageError
from sparsellm.hub.base import HUB_ID
from sparsellm.inputs.json_input import read_object
from sparsellm.inputs.yaml_input import dump_yaml
from sparsellm.patterns import parse_chosen
from sparsellm.recipe import Recipe
from sparsellm.records import PRUNING, Evaluation, Interval, Pruning, Settings, read_pruning
from sparsellm.storage.files import replace_atomically, write_all
from sparsellm.storage.results import read_results
from sparsepack.checkpoint import is_packed

CARD = "README.md"
_MARK = re.compile(r"<!-- Written by `sparsellm card`, which replaces it unless it was edited: ([0-9a-f]{16}) -->\n")
_ALWAYS = ("method", "sparsity", "calibration", "samples", "seq_len")  # of the recipe; other settings if not default


def rebuild_card(directory: Path, *, force: bool = False) -> Path:
    """Writes the card of a checkpoint anew, with the results of its evaluations; returns its path.

    Args:
        directory: of the checkpoint.
        force: overwrite a card that somebody else wrote or edited.

    Raises:
        StorageError: the directory has no ``pruning.json`` or was never evaluated, a file is damaged, or the card was
            edited. Nothing is overwritten then.
    """
    path = directory / CARD
    if not (directory / PRUNING).is_file():
        raise StorageError(f"{directory} has no {PRUNING}; give a checkpoint that `sparsellm prune` has written")
    evaluations = read_results(directory).evaluations
    if not evaluations:
        raise StorageError(f"{directory} was never evaluated; run `sparsellm eval` on it first, then `card` again")
    report = read_pruning(directory)
    config = read_object(directory / "config.json") if (directory / "config.json").is_file() else {}
    if not force and path.exists() and not is_unedited(path):
        raise StorageError(f"{path} was not written by sparsellm, or was edited since; --force replaces it")
    text = card_text(report, evaluations, packed=is_packed(config))
    replace_atomically(path, lambda file: write_all(file, text.encode()))
    return path


def is_unedited(path: Path) -> bool:
    """Whether a card is as :func:`card_text` made it."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text.replace(found[0], "", 1))


def first_card(report: Pruning) -> str:
    """The card of a checkpoint that was just pruned."""
    return card_text(report, [], packed=False)


def card_text(report: Pruning, evaluations: Iterable[Evaluation], *, packed: bool) -> str:
    """The text of a card, with a mark by which :func:`is_unedited` knows it.

    It does not name the directory, which may be moved or uploaded. Texts that come from files and users stand in code
    spans and blocks, so they are no markup.
    """
    results = [line for each in evaluations for line in _results(each)] or [
        "Not evaluated yet. `sparsellm eval` measures it, and `sparsellm card` adds the result here."
    ]
    base = _base(report)
    lines = [
        f"# {_code(base) if base else 'A language model'}, {report.sparsity_reached:.0%} sparse",
        "",
        *_summary(report),
        "",
        "## Results",
        "",
        *results,
        "",
        "## Use",
        "",
        *_use(packed),
        "",
        "## Recipe",
        "",
        "Other settings have their defaults. `recipe.yaml` has all; `pruning.json` has zeros and error of each linear.",
        "",
        *_fenced("yaml", dump_yaml(_settings(report.recipe))),
        "",
        "Made with " + ", ".join(_code(f"{tool} {version}") for tool, version in report.versions.items()) + ".",
    ]
    head, body = _front_matter(report), "\n".join(lines) + "\n"
    mark = f"<!-- Written by `sparsellm card`, which replaces it unless it was edited: {_digest(head + body)} -->"
    return f"{head}{mark}\n{body}"


def _front_matter(report: Pruning) -> str:
    from huggingface_hub import ModelCardData  # takes a tenth of a second

    pattern = report.recipe.get("pattern")
    fixed = isinstance(pattern, str) and parse_chosen(pattern) is None
    base = report.base.model_dump(include={"license", "license_name", "license_link"}, exclude_none=True)
    data = ModelCardData(
        base_model=_base(report),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparsellm", "pruning", "sparsity", *([f"sparsity-{pattern}"] if fixed else [])],
        **base,
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n"


def _base(report: Pruning) -> str | None:
    name = report.base.model
    return name if name and HUB_ID.fullmatch(name) else None


def _summary(report: Pruning) -> list[str]:
    base = _base(report)
    dense = f"[{_code(base)}](https://huggingface.co/{base})" if base else "A language model"
    pattern = report.recipe.get("pattern")
    return [
        f"{dense}, pruned after training by sparsellm: {report.sparsity_reached:.2%} of the weights of the blocks are "
        "zero.",
        "",
        "| | |",
        "|---|---|",
        f"| method | {_code(report.recipe.get('method'))} |",
        f"| sparsity over all matrices of the blocks | {report.sparsity_reached:.2%} |",
        f"| sparsity over the pruned linears | {report.sparsity_pruned:.2%} |",
        *([f"| pattern | {_code(pattern)} |"] if pattern else []),
        f"| zeros | {report.matrices.zeros:,} of {report.matrices.weights:,} |",
        f"| calibrated on | {_code(report.recipe.get('calibration'))}, {report.calibration_tokens:,} tokens |",
    ]


def _results(one: Evaluation) -> list[str]:
    """A table for one evaluation, under its protocol."""
    protocol, against = one.protocol, one.against
    rows = [("perplexity", _interval(one.perplexity))]
    if against is not None:
        dense = _code(Path(against.model).name)
        rows += [
            (f"perplexity of the dense model {dense}", _interval(against.perplexity)),
            (f"KL divergence from {dense}", _interval(against.divergence)),
            ("same likeliest token", f"{against.agreement:.1%}"),
            ("recovery", f"{against.recovery:.1%}"),
        ]
    for task, metrics in (one.tasks or {}).items():
        for metric, found in metrics.items():
            spread = f" ± {_number(found.stderr)}" if found.stderr is not None else ""
            rows.append((f"{_code(task)}, {_code(metric)}", _number(found.value) + spread))
    bos = {"yes": ", each begins with BOS", "no": ", none begins with BOS"}.get(protocol.bos, "")
    windows = f"windows of {protocol.window} tokens{bos}"
    return [
        f"On {_code(protocol.text)}: {windows}; {protocol.tokens:,} tokens scored.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in rows),
        "",
    ]


def _use(packed: bool) -> list[str]:
    load = [
        *(["import sparsellm  # opens packed checkpoints"] if packed else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'place = "path/to/this/checkpoint"  # or the repository that has it',
        "model = AutoModelForCausalLM.from_pretrained(place)",
        "tokenizer = AutoTokenizer.from_pretrained(place)",
    ]
    if packed:
        return ["The weights are packed, and stay packed in memory:", "", *_fenced("python", "\n".join(load))]
    return [
        "Plain transformers loads it; the zeros are stored like other weights:",
        "",
        *_fenced("python", "\n".join(load)),
        "",
        "Packed, it is smaller on disk and in memory, and decodes faster on CPUs with AVX-512:",
        "",
        *_fenced("sh", "pip install sparsellm\nsparsellm pack DIRECTORY --out packed"),
    ]


def _settings(recipe: Settings) -> Settings:
    """The settings of a recipe that are not the defaults, and those that are always of interest."""
    defaults = Recipe().model_dump()
    return {key: value for key, value in recipe.items() if key in _ALWAYS or value != defaults.get(key)}


def _code(value: object) -> str:
    """A code span, also inside of a table."""
    text = "".join(c if c.isprintable() else "�" for c in str(value)).replace("|", "¦")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest or not text.strip() else f"{fence}{text}{fence}"


def _fenced(language: str, text: str) -> list[str]:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.rstrip("\n").splitlines(), fence]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) and abs(value) < 1e4 else f"{value:.3e}"


def _interval(found: Interval) -> str:
    if found.low is None or found.high is None:
        return _number(found.value)
    return f"{_number(found.value)} ({_number(found.low)} to {_number(found.high)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
