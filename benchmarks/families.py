"""Which families of models can be pruned: every causal language model of the installed transformers, as a tiny one.

    python benchmarks/families.py
    python benchmarks/families.py --types gpt_neox gemma3 mixtral --method sparsegpt

A model of random weights is built from each family's default config with all sizes shrunk, saved by transformers, and
pruned from its directory. Right is a type of which the sparsity is reached over all matrices of the blocks, which plain
transformers reads again without a missing or unexpected weight, under the names that it had, and of which the logits at
sparsity 0 are those of the dense model, bit for bit. Prints a table. Each type has a process of its own.
"""

from __future__ import annotations

import argparse
import ast
import collections
import itertools
import multiprocessing
import os
import re
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import SparseLLMError
from sparsellm.storage.reader import CheckpointReader

LAYERS, WIDTH, VOCABULARY, POSITIONS = 2, 64, 300, 128
SPARSITY = 0.5
LARGEST = 20_000_000  # parameters
RIGHT = "right"
SUGGESTED = re.compile(r"set exclude=(\[.*\])")

# The first that matches a name gives its size; {heads}, {kv} and {head_dim} vary from one attempt to the next.
SIZES: list[tuple[str, int | str]] = [
    (r"\w*vocab_size\w*|n_vocab|n_words", VOCABULARY),
    (
        r"(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len\w*|seq_length)$",
        POSITIONS,
    ),
    (r"(num_hidden_layers|num_layers|n_layers?|(encoder|decoder|num_encoder|num_decoder)_layers|depth)$", LAYERS),
    (r"(num_key_value_heads|n_kv_heads|num_kv_heads|num_query_groups)$", "kv"),
    (r"(num_attention_heads|num_heads|n_heads?|(encoder|decoder)_attention_heads|\w+_num_heads)$", "heads"),
    (r"(head_dim|d_kv|attention_head_dim|attn_head_dim|\w*_key_head_dim|\w*_value_head_dim|d_head)$", "head_dim"),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim)$", 16),
    (r"rotary_dim$", 8),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|lora_rank)$", 32),
    (r"(num_experts_per_tok|moe_topk|top_k_experts|moe_top_k|num_experts_per_token|moe_k)$", 2),
    (r"(n_group|topk_group)$", 1),
    (r"(n_routed_experts|num_local_experts|num_experts|moe_num_experts)$", 4),
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)$", 1),
    (r"(moe_\w*intermediate_size|shared_expert_intermediate_size|expert_dim)$", 32),
    (r"(\w*intermediate_size|\w*ffn_dim|n_inner|d_ff|ffn_hidden_size|inner_dim|dim_ff)$", 96),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|word_embed_proj_dim|embedding_size|\w*hidden_size|dim_model|emb_dim)$",
        WIDTH,
    ),
    (r"(sliding_window|attention_window|block_size|chunk_size|attention_chunk_size)$", 32),
    (r"image_size$", 28),
    (r"patch_size$", 14),
]
DROPPED = re.compile(r"\w*_token_id|\w*_token_index|transformers_version|model_type|architectures|dtype|torch_dtype")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", help="model types; by default all")
    parser.add_argument("--method", nargs="+", default=["magnitude", "sparsegpt"])
    parser.add_argument("--seconds", type=float, default=60, help="for one type")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| type | result | reason |\n|---|---|---|", flush=True)
    counts: collections.Counter[str] = collections.Counter()
    for kind in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        result, reason = in_process(kind, arguments.method, arguments.seconds)
        counts[result] += 1
        print(f"| {kind} | {result} | {reason.replace('|', '/')[:300]} |", flush=True)
    total = sum(counts.values()) - counts["not built"]
    print(f"\n{total} types built with transformers {transformers.__version__}: ", end="")
    print(", ".join(f"{count} {result}" for result, count in counts.most_common()))


def in_process(kind: str, methods: list[str], seconds: float) -> tuple[str, str]:
    """The result for one type, of a process that is given so much time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, kind, methods))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return "too slow", f"more than {seconds:.0f} s"
        result: tuple[str, str] = receiver.recv()
        return result
    except EOFError:
        process.join()
        return "died", f"exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def child(sender: Connection, kind: str, methods: list[str]) -> None:
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)  # progress and warnings
    transformers.utils.logging.set_verbosity_error()
    try:
        result = tried(kind, methods)
    except SparseLLMError as error:
        result = "refused", re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/ ]+/", "", str(error))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        result = "fails", f"{reason} ({Path(where.filename).name}:{where.lineno})"
    sender.send(result)


def tried(kind: str, methods: list[str]) -> tuple[str, str]:
    """Prunes a tiny model of the type by each method; right, or what is not."""
    try:
        model = tiny(kind)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}".splitlines()[0]
    ids = torch.arange(4, 4 + 96).view(4, 24)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense"
        try:
            model.save_pretrained(source)
            dense = logits(read(source)[0], ids)
        except Exception as error:  # plain transformers does not save it, or not read what it saved
            return "not built", f"{type(error).__name__}: {error}".splitlines()[0]
        exclude: tuple[str, ...] = ()
        for method, sparsity in [*((method, SPARSITY) for method in methods), ("magnitude", 0.0)]:
            out = Path(folder) / f"{method}-{sparsity}"
            recipe = Recipe(method=method, sparsity=sparsity, samples=4, seq_len=24, exclude=exclude)
            try:
                result = sparsellm.prune(source, recipe, out=out, calibration=ids)
            except SparseLLMError as error:
                suggested = SUGGESTED.search(str(error))
                if suggested is None or exclude:
                    raise
                exclude = tuple(ast.literal_eval(suggested[1]))
                result = sparsellm.prune(source, recipe.updated(exclude=exclude), out=out, calibration=ids)
            if not exclude and result.sparsity < sparsity - 0.001:
                return "short", f"{method}: sparsity {result.sparsity:.2%}; {'; '.join(result.warnings)}"
            if set(CheckpointReader(out)) != set(CheckpointReader(source)):
                return "other names", str(sorted(set(CheckpointReader(out)) ^ set(CheckpointReader(source)))[:3])
            loaded, missing, unexpected = read(out)
            if missing or unexpected != read(source)[2]:
                return "not read back", f"missing {sorted(missing)[:2]}, unexpected {sorted(unexpected)[:2]}"
            if sparsity == 0 and not torch.equal(logits(loaded, ids), dense):
                return "other logits", "at sparsity 0"
    return RIGHT if not exclude else f"{RIGHT} but for exclude", "; ".join([*exclude, *result.warnings])


def read(directory: Path) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model as plain transformers loads it, and what it misses and does not expect."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    return model, set(info["missing_keys"]), set(info["unexpected_keys"])


def tiny(kind: str) -> PreTrainedModel:
    """A random model of the type whose forward runs.

    Raises:
        Exception: of the last attempt, whatever the family's code raises.
    """
    failed: Exception = ValueError("no attempt")
    for (heads, kv, head_dim), explicit in itertools.product(TRIES, (True, False)):
        try:
            config = AutoConfig.for_model(kind)
            changes = shrunk(config, {"heads": heads, "kv": kv, "head_dim": head_dim}, explicit=explicit)
            small = type(config)(**{**changes, **OWN.get(kind, {})})
            if kind in transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
                small.is_decoder = True
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(small).parameters())
            if size > LARGEST:
                raise ValueError(f"it did not become small: {size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(small).eval()
            logits(model, torch.arange(4, 52).view(2, 24))
            return model
        except Exception as error:
            failed = error
    raise failed


def shrunk(config: PretrainedConfig, variable: dict[str, int], *, explicit: bool) -> dict[str, Any]:
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
        elif isinstance(value, int) or (value is None and explicit and OFTEN_NONE.fullmatch(name)):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                changes[name] = variable[size] if isinstance(size, str) else size
        elif isinstance(value, list) and isinstance(depth, int) and len(value) == depth:
            changes[name] = [value[0], *value[-(LAYERS - 1) :]]
    for name, value in config.to_dict().items():
        if name in ("pad_token_id", "bos_token_id", "eos_token_id") and isinstance(value, int):
            changes[name] = min(value, 2)
    return changes


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.eval()(ids, use_cache=False).logits
    return found


if __name__ == "__main__":
    main()
