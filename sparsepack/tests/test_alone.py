"""A packed model runs where sparsepack and its dependencies are installed, and nothing else.

The model is packed by sparsellm in this interpreter. The environment is a fresh one: its packages come from the index,
its kernels are compiled, and pydantic is taken out again if a dependency brought it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What runs in the fresh environment: the directories of a packed model and of the dense one are its arguments.
PROGRAM = """
import importlib.util
import sys

import sparsepack
from sparsepack.module import PackedLinear, kernel_name
from transformers import AutoModelForCausalLM, AutoTokenizer

packed, dense = sys.argv[1:]
for name in ("sparsellm", "pydantic"):
    assert importlib.util.find_spec(name) is None, name
assert kernel_name() != "torch"
model = AutoModelForCausalLM.from_pretrained(packed)
tokenizer = AutoTokenizer.from_pretrained(packed)
assert any(isinstance(module, PackedLinear) for module in model.modules())
ids = tokenizer("a b c", return_tensors="pt")["input_ids"]
answer = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
assert answer.shape[1] == ids.shape[1] + 4
generated = sparsepack.generate(model, tokenizer, "a b c", max_new_tokens=4)
assert generated.new_tokens >= 1
compared = sparsepack.compare(packed, dense, prompt_tokens=4, new_tokens=2, repeats=1)
assert {speed.model for speed in compared.speeds} == {"packed", "dense"}
for call in (lambda: sparsepack.generate(model, tokenizer, "a", seed=-1),
             lambda: sparsepack.compare(packed, dense, repeats=0)):
    try:
        call()
    except sparsepack.PackError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_packed_model_runs_without_sparsellm(tmp_path: Path) -> None:
    packed, dense = packed_and_dense(tmp_path)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    if sys.platform == "win32":
        python = environment / "Scripts" / "python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tree = tmp_path / "tree"
    built = shutil.ignore_patterns("build", "*.egg-info", "*.so", "tests")
    shutil.copytree(ROOT, tree, ignore=built)
    install = [python, "-m", "pip", "install", "--quiet", tree]
    subprocess.run(install, check=True, env=clean, cwd=tmp_path)
    # typer, which transformers requires, may have brought it
    remove = [python, "-m", "pip", "uninstall", "--yes", "pydantic"]
    subprocess.run(remove, check=True, capture_output=True)
    done = subprocess.run(
        [python, "-c", PROGRAM, packed, dense],
        capture_output=True,
        text=True,
        env=clean,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "seed is -1: it should be greater than or equal to 0",
        "repeats is 0: it should be greater than or equal to 1",
    ]


def packed_and_dense(directory: Path) -> tuple[Path, Path]:
    """The directories of a small Llama, packed as int4 and dense, with a tokenizer."""
    sparsellm = pytest.importorskip("sparsellm")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {
        word: number
        for number, word in enumerate(["</s>", "<unk>", "a", "b", "c", "d"])
    }
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    dense = directory / "dense"
    packed = directory / "packed"
    LlamaForCausalLM(config).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    sparsellm.pack(dense, out=packed, values="int4")
    return packed, dense
