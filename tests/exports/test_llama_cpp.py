"""llama.cpp runs what is exported: the greedy tokens and the logits of the checkpoint."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsellm
from sparsellm import Recipe
from tests.exports.checkpoints import mixtral, pruned, wide_llama
from tests.models import converter

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="pip install llama-cpp-python, which is compiled from source"
)
pytestmark = pytest.mark.slow

CLOSE = 1e-5  # KL of the logits in nats: sums of fp32 in another order


def in_fp32(file: Path) -> Path:
    """The file with every tensor dequantised by llama.cpp, which else rounds activations to int8 to multiply them."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize, settings.nthread = 0, True, 1
    out = file.with_name(f"{file.stem}-fp32.gguf")
    assert (
        llama_cpp.llama_model_quantize(
            str(file).encode(), str(out).encode(), ctypes.byref(settings)
        )
        == 0
    )
    return out


def compared(
    file: Path, directory: Path, ids: list[int], tokens: int
) -> tuple[int, float]:
    """How many greedy tokens in a row are those of the checkpoint, and the KL of the logits of the prompt."""
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    there: Any = llama_cpp.Llama(
        str(file), n_ctx=128, logits_all=True, verbose=False, n_threads=1, **cache
    )
    here = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    steps = there.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    theirs = [token for token, _ in zip(steps, range(tokens), strict=False)]
    there.reset()
    there.eval(ids)
    logits = torch.from_numpy(there.scores[: len(ids)].copy())
    there.close()
    ours = list(ids)
    with torch.no_grad():
        dense = here(torch.tensor([ids])).logits[0]
        for _ in range(tokens):  # not generate(), which ends or forbids the end
            ours.append(int(here(torch.tensor([ours])).logits[0, -1].argmax()))
    same = next(
        (
            i
            for i, pair in enumerate(zip(theirs, ours[len(ids) :], strict=True))
            if pair[0] != pair[1]
        ),
        tokens,
    )
    parts = (logits.log_softmax(-1), dense.log_softmax(-1))
    return same, float(
        torch.nn.functional.kl_div(*parts, log_target=True, reduction="batchmean")
    )


@pytest.mark.parametrize(
    ("make", "grid"), [(wide_llama, "q4_0"), (mixtral, "q4_0"), (mixtral, "q8_0")]
)
def test_tiny_models_run_in_llama_cpp(tmp_path: Path, make: Any, grid: str) -> None:
    directory = pruned(make(), tmp_path, grid, effort=1)
    sparsellm.export(
        directory,
        to="gguf",
        out=tmp_path / "out.gguf",
        converter=converter.__file__,
    )
    same, divergence = compared(
        in_fp32(tmp_path / "out.gguf"), directory, list(range(5, 25)), 24
    )
    assert (same, divergence < CLOSE) == (24, True)
    # with rounded activations
    assert compared(tmp_path / "out.gguf", directory, list(range(5, 25)), 24)[1] < 1e-2


def test_the_demo_runs_in_llama_cpp(tmp_path: Path) -> None:
    recipe = Recipe(
        sparsity=0.3, grid="q4_0", samples=2, seq_len=128, effort=0, method="sparsegpt"
    )
    sparsellm.prune("demo", recipe, out=tmp_path / "pruned")
    sparsellm.export(tmp_path / "pruned", to="gguf", out=tmp_path / "out.gguf")
    ids = AutoTokenizer.from_pretrained(tmp_path / "pruned")(
        "The Python programming language is"
    )["input_ids"]
    same, divergence = compared(
        in_fp32(tmp_path / "out.gguf"), tmp_path / "pruned", ids, 24
    )
    assert (same, divergence < CLOSE) == (24, True)
