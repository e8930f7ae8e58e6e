"""Embedding and head in int8, also where the embedding multiplies its rows, as those of the Gemma kind do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

import sparsellm
from sparsellm.errors import RecipeError
from sparsepack.errors import FormatError, Note
from sparsepack.module import PackedEmbedding, PackedLinear, row_scale, to_dense
from tests.models import tiny_llama
from tests.models.families import family, gemma3_text

BUILT: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": partial(tiny_llama, tie_word_embeddings=False),
    "tied": partial(tiny_llama, tie_word_embeddings=True),
    "gemma2": partial(family, "Gemma2"),
    "gemma3": lambda: gemma3_text().bfloat16(),
}


@pytest.mark.parametrize("name", BUILT)
def test_an_int8_embedding_and_head_compute_as_the_dense_ones(
    name: str, tmp_path: Path
) -> None:
    model = BUILT[name]()
    model.save_pretrained(tmp_path / "model")
    if name == "tied":  # and stored twice
        weights = {key: weight.clone() for key, weight in model.state_dict().items()}
        save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    packed = sparsellm.pack(
        tmp_path / "model", out=tmp_path / "packed", head="int8"
    ).path
    loaded = sparsellm.load(packed, activations="fp32")
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert (type(embedding), type(head)) == (PackedEmbedding, PackedLinear)
    assert (head.weight_values is embedding.weight_values) == (name != "llama")
    dense = sparsellm.load(sparsellm.unpack(packed, out=tmp_path / "unpacked").path)
    plain, stored = dense.get_input_embeddings(), model.get_input_embeddings().weight
    step = stored.float().abs().amax(dim=1, keepdim=True) / 127
    # rounded to bf16 once more
    bound = 0.5001 * step + (
        stored.abs() / 128 if stored.dtype == torch.bfloat16 else 0
    )
    assert bool(((plain.weight - stored).abs() <= bound).all())
    ids = torch.randint(
        model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0)
    )
    if name == "gemma3":  # transformers 4 multiplies Gemma 2's outside the embedding
        assert plain(ids).abs().max() > 1.5 * plain.weight[ids].abs().max()
    for same in (loaded, pickle.loads(pickle.dumps(loaded))):
        with pytest.raises(
            FormatError, match="a packed embedding cannot be resized; unpack"
        ):
            same.resize_token_embeddings(model.config.vocab_size + 8)
    same.dequantize()
    assert (
        len(same.resize_token_embeddings(model.config.vocab_size + 8).weight)
        == model.config.vocab_size + 8
    )
    loaded.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected, logits = plain(ids), dense(ids).logits
        for other in (
            loaded,
            sparsellm.load(tmp_path / "saved", activations="fp32"),
            to_dense(loaded),
        ):
            assert torch.equal(other.get_input_embeddings()(ids), expected)
            assert torch.allclose(
                other(ids).logits, logits, atol=0.05 if name == "gemma3" else 1e-4
            )
    restored = loaded.get_input_embeddings()  # to_dense works in place
    assert (loaded.get_output_embeddings().weight is restored.weight) == (
        name != "llama"
    )
    assert type(restored) is type(model.get_input_embeddings())
    assert restored.num_embeddings == len(restored.weight) == model.config.vocab_size


class OtherScaledWordEmbedding(nn.Embedding):
    """As in BART's kind: a number, which is not rounded to the dtype."""

    embed_scale = 2.0


def test_the_factor_of_rows_is_that_of_the_module() -> None:
    assert row_scale(nn.Embedding(3, 4)) == 1.0
    assert row_scale(nn.Linear(3, 4)) is None
    assert row_scale(OtherScaledWordEmbedding(3, 4)) is None
    module, ids = gemma3_text().get_input_embeddings(), torch.arange(5)
    assert torch.allclose(module(ids), module.weight[ids] * (row_scale(module) or 0.0))


def test_an_embedding_of_another_kind_is_still_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma3_text().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sparsellm.convert.row_scale", lambda module: None)
    said = (
        r"embed_tokens.weight is a .*Embedding, which has no int8 form; use head=keep"
    )
    with pytest.raises(RecipeError, match=said):
        sparsellm.pack(tmp_path / "model", out=tmp_path / "packed", head="int8")
    assert not (tmp_path / "packed").exists()


def test_without_a_form_in_int8_it_stays_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma3_text().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sparsellm.convert.row_scale", lambda module: None)
    with pytest.warns(Note, match=r"embed_tokens.weight is stored as it is: a .*Emb"):
        packed = sparsellm.pack(
            tmp_path / "model", out=tmp_path / "packed", values="int8"
        )
    assert not packed.head
    assert any(packed.linears.values())
