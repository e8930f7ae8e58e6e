"""An int8 head of models whose embedding multiplies its rows, as those of the Gemma kind do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import sparsellm
from sparsellm.errors import RecipeError
from sparsepack.module import PackedEmbedding, row_scale, to_dense
from tests.models.families import family, gemma3_text

BUILT: dict[str, Callable[[], PreTrainedModel]] = {"gemma2": partial(family, "Gemma2"), "gemma3": gemma3_text}


@pytest.mark.parametrize(("name", "dtype"), [("gemma2", torch.float32), ("gemma3", torch.bfloat16)])
def test_a_scaled_embedding_is_packed_as_it_computes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = BUILT[name]().to(dtype)
    model.save_pretrained(tmp_path / "model")
    packed = sparsellm.pack(tmp_path / "model", out=tmp_path / "packed", head="int8").path
    loaded = sparsellm.load(packed, activations="fp32")
    embedding = loaded.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    dense = sparsellm.load(sparsellm.unpack(packed, out=tmp_path / "unpacked").path)
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    if name == "gemma3":  # transformers 4 multiplies Gemma 2's outside the embedding
        plain = dense.get_input_embeddings()
        assert plain(ids).abs().max() > 1.5 * plain.weight[ids].abs().max()
    loaded.save_pretrained(tmp_path / "saved")
    again = sparsellm.load(tmp_path / "saved", activations="fp32")
    with torch.no_grad():
        wanted, logits = dense.get_input_embeddings()(ids), dense(ids).logits
        for other in (loaded, again, to_dense(loaded)):
            assert torch.equal(other.get_input_embeddings()(ids), wanted)
            assert torch.allclose(other(ids).logits, logits, atol=1e-4 if dtype == torch.float32 else 0.05)
    restored = loaded.get_input_embeddings()  # to_dense works in place
    assert type(restored) is type(model.get_input_embeddings())
    assert restored.num_embeddings == len(restored.weight) == model.config.vocab_size


class OtherScaledWordEmbedding(nn.Embedding):
    """As in BART's kind: a number, which is not rounded to the dtype."""

    embed_scale = 2.0


def test_the_factor_of_rows_is_that_of_the_module() -> None:
    assert row_scale(nn.Embedding(3, 4)) == 1.0
    assert row_scale(nn.Linear(3, 4)) is None
    assert row_scale(OtherScaledWordEmbedding(3, 4)) is None
    module = gemma3_text().get_input_embeddings()
    ids = torch.arange(5)
    assert torch.allclose(module(ids), module.weight[ids] * (row_scale(module) or 0.0))


def test_an_embedding_of_another_kind_is_still_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gemma3_text().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sparsellm.convert.row_scale", lambda module: None)
    with pytest.raises(
        RecipeError, match=r"embed_tokens.weight is a .*Embedding, which has no int8 form; use head=keep"
    ):
        sparsellm.pack(tmp_path / "model", out=tmp_path / "packed", head="int8")
    assert not (tmp_path / "packed").exists()
