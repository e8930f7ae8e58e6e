"""The real vLLM against transformers, in fp32: greedy tokens and the first probability of tiny packed models.

``VLLM_PYTHON`` names the interpreter of an environment with vLLM, sparsepack and sparsepack-vllm:

    VLLM_PYTHON=/path/to/python pytest -m vllm
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsellm
import sparsepack
from sparsellm.patterns import NM
from tests.models import save_tiny, tiny_tokenizer
from tests.models.families import family
from tests.models.pruned import prune_tiny

pytestmark = pytest.mark.vllm

PYTHON = os.environ.get("VLLM_PYTHON", sys.executable)
NEW_TOKENS = 12
PROMPTS = [
    torch.arange(2, 2 + length).mul(7).remainder(290).add(2).tolist()
    for length in (5, 20, 33)
]
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
# name: family, what its config has besides, type of the values
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama": ("Llama", {}, "fp32"),
    "Llama 2:4": ("Llama", {}, "bf16"),
    "Llama tied": ("Llama", TIED, "int8"),
    "Qwen2 with biases": ("Qwen2", {}, "int8"),
    "Qwen3": ("Qwen3", TIED, "int4"),
    "Mistral": ("Mistral", {}, "int3"),
    "Gemma 3": ("Gemma3Text", {**TIED, "query_pre_attn_scalar": 32}, "int8"),
    "Phi-3": ("Phi3", {}, "int4"),
    "Qwen3 mixture": ("Qwen3Moe", {}, "int8"),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the packed checkpoint of one of :data:`MODELS`, once."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def make(name: str) -> Path:
        kind, changes, values = MODELS[name]
        pattern = NM(2, 4) if "2:4" in name else None
        model = prune_tiny(family(kind, **{**SIZES, **changes}), pattern)
        dense = save_tiny(model, tiny_tokenizer(), folder / f"{name} dense")
        sparsellm.pack(dense, out=folder / name, values=values)  # type: ignore[arg-type]
        return folder / name

    return make


def in_vllm(jobs: list[dict[str, Any]], folder: Path) -> list[Any]:
    """The answers of the real vLLM; a failure shows what it printed."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "SPARSELLM_ACTIVATIONS": "fp32",  # a batch may be rounded, and vLLM's are others
        "HF_HUB_OFFLINE": "1",
    }
    program = Path(__file__).with_name("real.py")
    done = subprocess.run(
        [PYTHON, program, folder / "answers.json"],
        input=json.dumps(jobs),
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    given: list[Any] = json.loads((folder / "answers.json").read_text())
    return given


def job_of(path: Path, *, compiled: bool = False, ranks: int = 1) -> dict[str, Any]:
    return {
        "path": str(path),
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "compiled": compiled,
        "ranks": ranks,
    }


def check(path: Path, given: list[Any]) -> None:
    """Compares the answers with those of transformers."""
    model = sparsepack.load(path, dtype="float32", activations="fp32")
    for ids, answer in zip(PROMPTS, given, strict=True):
        prompt = torch.tensor([ids])
        generated: Any = model.generate(
            prompt,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        assert generated[0, len(ids) :].tolist() == answer["ids"]
        with torch.no_grad():
            logits = model(prompt).logits[0, -1].double()
        expected = float(logits.log_softmax(0)[answer["ids"][0]])
        assert abs(expected - answer["logprob"]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(
    name: str, packed: Any, tmp_path: Path
) -> None:
    path = packed(name)
    (given,) = in_vllm([job_of(path)], tmp_path)
    check(path, given)


def test_a_compiled_model_gives_the_same_tokens(packed: Any, tmp_path: Path) -> None:
    path = packed("Llama tied")
    (given,) = in_vllm([job_of(path, compiled=True)], tmp_path)
    check(path, given)


def test_two_ranks_give_the_same_tokens(packed: Any, tmp_path: Path) -> None:
    path = packed("Llama tied")
    (given,) = in_vllm([job_of(path, ranks=2)], tmp_path)
    check(path, given)
