"""Which families of models can be pruned: every causal language model of the installed transformers, as a tiny one.

    python benchmarks/families.py --out docs/families.md
    python benchmarks/families.py --types gpt_neox gemma3 mixtral

A model of random weights is built from each family's default config with all sizes shrunk, saved by transformers, and
pruned from its directory by each of :data:`RUNS`. A run is right if the sparsity is reached over all matrices of the
blocks, or the result says which matrices keep it from that; if plain transformers reads the checkpoint again without a
missing or unexpected weight, under the names that it had; and if, at sparsity 0, its logits are those of the dense
model, bit for bit. Parameters that a run refuses to leave dense are accepted as it says, and listed.

Prints the table. ``--out`` gets a page with the types of each result, and ``data/families.csv`` next to it the reason
of each type. Each type has a process of its own. Exit code 1 if a run of any type fails otherwise than by an error of
sparsellm, or its result is wrong.
"""

from __future__ import annotations

import argparse
import ast
import collections
import csv
import itertools
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsellm
from sparsellm import PruneResult, Recipe
from sparsellm.errors import SparseLLMError
from sparsellm.files.reader import CheckpointReader

LAYERS, WIDTH, VOCABULARY, POSITIONS = 2, 64, 300, 128
LARGEST = 20_000_000  # parameters
RUNS: dict[str, dict[str, Any]] = {
    "sparsegpt 50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "sparsellm 60 %, effort 0": {"method": "sparsellm", "sparsity": 0.6, "effort": 0},
    "sparsellm 60 %, effort 1": {"method": "sparsellm", "sparsity": 0.6, "effort": 1},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "sparsity 0": {"method": "magnitude", "sparsity": 0.0},
}
RIGHT, SOME_DENSE, PART, REFUSED = "right", "right, some dense", "in part", "refused"
NOT_BUILT, TOO_SLOW = "not built", "too slow"
FAILS, WRONG, DIED = "fails", "wrong", "died"  # none of these may be
ORDER = (RIGHT, SOME_DENSE, PART, REFUSED, TOO_SLOW, NOT_BUILT, FAILS, WRONG, DIED)
REASON = 150  # characters of a reason on the page
UNFINISHED = re.compile(r" \([^()]*$")  # what is cut inside brackets
CONVERTED = re.compile(r"(?<=transposes) \d+ tensors of .*")
SUGGESTED = re.compile(r"allow_dense=(\[.*\])")

# The first that matches a name gives its size; {heads}, {kv} and {head_dim} vary from one attempt to the next.
SIZES: list[tuple[str, int | str]] = [
    (r"\w*vocab_size\w*|n_vocab|n_words", VOCABULARY),
    (
        r"(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len\w*|seq_length)$",
        POSITIONS,
    ),
    (
        r"(num_hidden_layers|num_layers|n_layers?|(encoder|decoder|num_encoder|num_decoder)_layers|depth)$",
        LAYERS,
    ),
    (r"(num_key_value_heads|n_kv_heads|num_kv_heads|num_query_groups)$", "kv"),
    (
        r"(num_attention_heads|num_heads|n_heads?|(encoder|decoder)_attention_heads|\w+_num_heads)$",
        "heads",
    ),
    (
        r"(head_dim|d_kv|attention_head_dim|attn_head_dim|\w*_key_head_dim|\w*_value_head_dim|d_head)$",
        "head_dim",
    ),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim)$", 16),
    (r"rotary_dim$", 8),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank)$", 32),
    (
        r"(num_experts_per_tok|moe_topk|top_k_experts|moe_top_k|num_experts_per_token|moe_k)$",
        2,
    ),
    (r"(n_group|topk_group)$", 1),
    (r"(n_routed_experts|num_local_experts|num_experts|moe_num_experts)$", 4),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)$", 1),
    (r"(moe_\w*intermediate_size|shared_expert_intermediate_size|expert_dim)$", 32),
    (
        r"(\w*intermediate_size\w*|\w*ffn_dim|n_inner|d_?ff|ffn_hidden_size|inner_dim|dim_ff)$",
        96,
    ),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|word_embed_proj_dim|embedding_size|\w*hidden_size|dim_model|emb_dim)$",
        WIDTH,
    ),
    (r"(sliding_window|attention_window|block_size|\w*chunk_size)$", 32),
    (r"image_size$", 28),
    (r"patch_size$", 14),
]
DROPPED = re.compile(
    r"\w*_token_id|\w*_token_index|transformers_version|model_type|architectures|dtype|torch_dtype"
)
OFTEN_NONE = re.compile(
    r"head_dim|num_key_value_heads|num_experts_per_tok|n_routed_experts|n_shared_experts|n_group|topk_group"
)
OWN: dict[str, dict[str, Any]] = {  # what follows from no size
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
}
TRIES = [(4, 2, 16), (4, 4, 16), (4, 1, 16), (8, 8, 8), (2, 2, 32)]


@dataclass
class Tried:
    """What the runs of one type showed.

    Attributes:
        kind: the type's name.
        cells: for each of :data:`RUNS`, what to print; empty if no run was possible.
        states: one of the constants above for each run.
        reasons: why a run is not right, or what it leaves dense.
    """

    kind: str
    cells: dict[str, str] = field(default_factory=dict)
    states: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """One word for all runs: the worst of them, where refusals of some runs are a part."""
        worst = next(
            (
                state
                for state in (DIED, WRONG, FAILS, TOO_SLOW, NOT_BUILT)
                if state in self.states
            ),
            None,
        )
        if worst or self.states == {REFUSED}:
            return worst or REFUSED
        return (
            PART
            if REFUSED in self.states
            else SOME_DENSE
            if SOME_DENSE in self.states
            else RIGHT
        )

    def add(self, run: str, state: str, cell: str, reason: str = "") -> None:
        self.cells[run] = cell
        self.states.add(state)
        self.explain(reason)

    def explain(self, reason: str) -> None:
        if reason and reason not in self.reasons:
            self.reasons.append(reason)

    def reason(self) -> str:
        return (
            "; ".join(self.reasons)
            .replace("|", "/")
            .replace("*", r"\*")
            .replace("<", "&lt;")
        )

    def short_reason(self) -> str:
        """The reason as the page has it: alike for types that are refused, or not built, for the same cause."""
        if self.result == NOT_BUILT:
            return "transformers does not build, save or read a small model of the type"
        return UNFINISHED.sub(
            "",
            CONVERTED.sub(" tensors while it loads the type", self.reason())[:REASON],
        )

    def row(self) -> str:
        cells = [self.cells.get(run, "–") for run in RUNS]
        return (
            f"| {self.kind} | {self.result} | {' | '.join(cells)} | {self.reason()} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", help="model types; by default all")
    parser.add_argument(
        "--seconds", type=int, default=90, help="of CPU time for one type"
    )
    parser.add_argument("--jobs", type=int, default=2, help="types tried at once")
    parser.add_argument("--out", type=Path, help="a Markdown page to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    header = (
        f"| type | result | {' | '.join(RUNS)} | why |\n|{'---|' * (len(RUNS) + 3)}"
    )
    print(header, flush=True)
    done = []
    for tried in all_tried(
        arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), arguments
    ):
        done.append(tried)
        print(tried.row(), flush=True)
    done.sort(key=lambda tried: tried.kind)
    print(f"\n{summary(done)}")
    if arguments.out is not None:
        page = f"{PAGE.format(summary=summary(done))}\n{grouped(done)}\n"
        arguments.out.write_text(page)
        write_reasons(done, arguments.out.parent / "data" / "families.csv")
    if any(tried.result in (DIED, FAILS, WRONG) for tried in done):
        raise SystemExit(1)


PAGE = """# Families

{summary}

Every type of causal language model in transformers is built as a tiny random model from its default config, saved,
and pruned by `sparsegpt` (50 %), `sparsellm` (60 %, efforts 0 and 1), `wanda` (2:4), and at sparsity 0.

* *Right*: the sparsity is reached, plain transformers reads the checkpoint under the names it had, and at sparsity 0
  the logits are those of the dense model, bit for bit.
* *Some dense*: matrices stay dense, each a *gate*, *small* (at most 2 % of its block), or *allowed dense* by
  `--set allow_dense`. In brackets: the sparsity over all matrices of the blocks at 50 %, if below 49.5 %.
* *In part*: `sparsellm` refuses the type, the local methods prune it.
* *Refused*: an error of one line before the work.
* *Not built*: transformers does not build, save or read a small model of the type.

[families.csv](data/families.csv) has each type's reason. Printed by `benchmarks/families.py`.
"""


def sparsity(tried: Tried) -> str:
    """The sparsity over all matrices of the blocks in per cent, if it is below what was asked for."""
    percent = next(iter(tried.cells.values()), "").removeprefix("✓").strip()
    number = percent.removesuffix("%")
    is_low = number.replace(".", "").isdigit() and float(number) < 49.5
    return number if is_low else ""


def grouped(done: Sequence[Tried]) -> str:
    """The table: a row for all types with one result."""
    rows: dict[str, list[str]] = {}
    for tried in done:
        low = sparsity(tried)
        name = f"{tried.kind} ({low} %)" if low else tried.kind
        rows.setdefault(tried.result, []).append(name)
    lines = [
        f"| {result} | {', '.join(rows[result])} |"
        for result in ORDER
        if result in rows
    ]
    return "\n".join(["| result | types |", "|---|---|", *lines])


def write_reasons(done: Sequence[Tried], path: Path) -> None:
    """Writes a row for each type: its result, its sparsity if that is low, and the reason."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["type", "result", "sparsity at 50 %", "why"])
        for tried in done:
            writer.writerow(
                [tried.kind, tried.result, sparsity(tried), tried.short_reason()]
            )


def summary(done: Sequence[Tried]) -> str:
    counts = collections.Counter(tried.result for tried in done)
    total = len(done) - counts.pop(NOT_BUILT, 0)
    parts = "; ".join(f"{count} {result}" for result, count in counts.most_common())
    return f"{total} types built with transformers {transformers.__version__}: {parts}."


def all_tried(kinds: Sequence[str], arguments: argparse.Namespace) -> Iterator[Tried]:
    """Tries each type in a process of its own, several at once; a type that takes too long is killed."""
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[str, ForkProcess]] = {}
    left = list(kinds)
    while left or running:
        while left and len(running) < arguments.jobs:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=child, args=(sender, left[0], arguments.seconds)
            )
            process.start()
            sender.close()
            running[receiver] = left.pop(0), process
        for receiver in [
            item for item in wait(list(running)) if isinstance(item, Connection)
        ]:
            kind, process = running.pop(receiver)
            try:
                tried: Tried = receiver.recv()
            except EOFError:
                process.join()
                slow = process.exitcode == -signal.SIGXCPU
                reason = (
                    f"more than {arguments.seconds} s"
                    if slow
                    else f"exit code {process.exitcode}"
                )
                tried = Tried(
                    kind, states={TOO_SLOW if slow else DIED}, reasons=[reason]
                )
            process.join()
            yield tried


def child(sender: Connection, kind: str, seconds: int) -> None:
    # a signal first, which names the cause
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)  # progress and warnings
    transformers.utils.logging.set_verbosity_error()
    sender.send(tried_type(kind))


def tried_type(kind: str) -> Tried:
    """Prunes a tiny model of the type by each of the runs."""
    tried = Tried(kind)
    ids = torch.arange(4, 4 + 96).view(4, 24)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        try:
            tiny(kind).save_pretrained(source)
            model, *info = read(source)
            dense = logits(model, ids)
        except Exception as error:  # plain transformers does not run it, not save it, or not read what it saved
            tried.add(
                "",
                NOT_BUILT,
                "",
                f"{type(error).__name__}: {error}".splitlines()[0][:200],
            )
            return tried
        accepted: list[str] = []
        for run, settings in RUNS.items():
            out = Path(folder) / run
            try:
                result = pruned(source, out, ids, settings, accepted)
                wrong = faults(result, out, source, info, dense, ids)
            except SparseLLMError as error:
                reason = str(error).replace(f"{folder}/", "")
                tried.add(
                    run,
                    REFUSED,
                    "refused",
                    reason if len(reason) < 240 else f"{reason[:240]}…",
                )
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                tried.add(
                    run,
                    FAILS,
                    "fails",
                    f"{reason[:200]} ({Path(where.filename).name}:{where.lineno})",
                )
            else:
                short = result.sparsity < result.recipe.sparsity - 0.001
                cell = f"✓ {result.sparsity:.1%}" if short else "✓"
                right = SOME_DENSE if short else RIGHT
                tried.add(
                    run, WRONG if wrong else right, "wrong" if wrong else cell, wrong
                )
                for left, why in dict.fromkeys(
                    (matrix.kind, matrix.reason) for matrix in result.dense
                ):
                    tried.explain(f"{left}: {why}")
                if any(
                    "no calibration token reached" in warning
                    for warning in result.warnings
                ):
                    tried.explain("linears that no token reaches: by magnitude")
                if any("outside the blocks" in warning for warning in result.warnings):
                    tried.explain("linears outside the blocks: dense")
    return tried


def pruned(
    source: Path,
    out: Path,
    ids: torch.Tensor,
    settings: dict[str, Any],
    accepted: list[str],
) -> PruneResult:
    """The result of one run; what it refuses to leave dense unasked is added to ``accepted``."""
    recipe = Recipe(samples=4, seq_len=24, allow_dense=accepted, **settings)
    try:
        return sparsellm.prune(source, recipe, out=out, calibration=ids)
    except SparseLLMError as error:
        suggested = SUGGESTED.search(str(error))
        if suggested is None or accepted:
            raise
        accepted += ast.literal_eval(suggested[1])
        return sparsellm.prune(
            source, recipe.updated(allow_dense=accepted), out=out, calibration=ids
        )


def faults(
    result: PruneResult,
    out: Path,
    source: Path,
    info: list[set[str]],
    dense: torch.Tensor,
    ids: torch.Tensor,
) -> str:
    """What is wrong with a finished run; empty if nothing is."""
    asked = result.recipe.sparsity
    if result.sparsity < asked - 0.001 and not any(
        "was requested" in warning for warning in result.warnings
    ):
        return f"sparsity {result.sparsity:.2%} of {asked:.2%}, without a word"
    if result.sparsity_pruned < asked - 0.001:
        return (
            f"sparsity {result.sparsity_pruned:.2%} of {asked:.2%} in what was pruned"
        )
    if set(CheckpointReader(out)) != set(CheckpointReader(source)):
        return f"other names: {sorted(set(CheckpointReader(out)) ^ set(CheckpointReader(source)))[:3]}"
    loaded, *loading = read(out)
    if loading != info:
        return f"not read back: missing {sorted(loading[0])[:2]}, unexpected {sorted(loading[1])[:2]}"
    if asked == 0 and not torch.equal(logits(loaded, ids), dense):
        return "other logits at sparsity 0"
    return ""


def read(directory: Path) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model as plain transformers loads it, and what it misses and does not expect."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    model, info = loaded
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def tiny(kind: str) -> PreTrainedModel:
    """A random model of the type whose forward runs.

    Raises:
        Exception: the last attempt failed, with whatever the family's code raises.
    """
    failed: Exception = ValueError("no attempt")
    for (heads, kv, head_dim), explicit in itertools.product(TRIES, (True, False)):
        try:
            config = AutoConfig.for_model(kind)
            changes = shrunk(
                config,
                {"heads": heads, "kv": kv, "head_dim": head_dim},
                explicit=explicit,
            )
            small = type(config)(**{**changes, **OWN.get(kind, {})})
            if (
                kind
                in transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
            ):
                small.is_decoder = True
            with torch.device("meta"):
                size = sum(
                    parameter.numel()
                    for parameter in AutoModelForCausalLM.from_config(
                        small
                    ).parameters()
                )
            if size > LARGEST:
                raise ValueError(
                    f"it did not become small: {size / 1e6:.0f} million parameters"
                )
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(small).eval()
            logits(model, torch.arange(4, 52).view(2, 24))
            return model
        except Exception as error:
            failed = error
    raise failed


def shrunk(
    config: PretrainedConfig, variable: dict[str, int], *, explicit: bool
) -> dict[str, Any]:
    """What to change of a default config so that its model is tiny.

    Args:
        config: the default config.
        variable: numbers of heads and their size.
        explicit: also set sizes that are None by default.
    """
    changes: dict[str, Any] = {}
    depth = getattr(config, "num_hidden_layers", None)
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None) if isinstance(value, dict) else None
        if isinstance(inner, PretrainedConfig):
            changes[name] = shrunk(inner, variable, explicit=explicit)
        elif DROPPED.fullmatch(name) or isinstance(value, bool):
            continue
        elif isinstance(value, int) or (
            value is None and explicit and OFTEN_NONE.fullmatch(name)
        ):
            size = next(
                (size for pattern, size in SIZES if re.fullmatch(pattern, name)), None
            )
            if size is not None:
                changes[name] = variable[size] if isinstance(size, str) else size
        elif isinstance(value, list) and isinstance(depth, int) and len(value) == depth:
            size = next(
                (size for pattern, size in SIZES if re.fullmatch(pattern, name)), None
            )
            few = [value[0], *value[-(LAYERS - 1) :]]
            changes[name] = [
                size if isinstance(item, int) and isinstance(size, int) else item
                for item in few
            ]
    for name, value in config.to_dict().items():
        if name in ("pad_token_id", "bos_token_id", "eos_token_id") and isinstance(
            value, int
        ):
            changes[name] = min(value, 2)
    return changes


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    loading: torch.Tensor = model.eval()(ids, use_cache=False).logits
    return loading


if __name__ == "__main__":
    main()
