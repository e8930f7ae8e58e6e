"""`sparsellm tune`: a pruned checkpoint is trained on a text and keeps its zeros; what cannot be trained is refused."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import MemoryBudgetError
from sparsellm.interrupts import Interrupted
from sparsellm.tuning import recover
from tests.files.small import shards_of, tensors_of
from tests.killing import ahead_of
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.families import family, mixtral
from tests.models.pruned import prune_tiny
from tests.report.pages import rewrite

SMALL = ("--steps", 12, "--seq-len", 32, "--batch", 4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the same few words come again and again\n" * 300)
    return path


@pytest.fixture(scope="module")
def pruned(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tune") / "pruned"
    dense = save_tiny(
        tiny_llama(tie_word_embeddings=True), tiny_tokenizer(), out.with_name("dense")
    )
    tensors = tensors_of(
        dense
    )  # with a tensor that the model does not load, and a head that is stored twice
    tensors |= {
        "visual.weight": torch.ones(2),
        "lm_head.weight": tensors["model.embed_tokens.weight"],
    }
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        dense / "model.safetensors",
        {"format": "pt"},
    )
    recipe = Recipe(
        method="magnitude", sparsity=0.6, calibration=str(text), samples=4, seq_len=32
    )
    return sparsellm.prune(dense, recipe, out=out).path


@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_checkpoint_recovers_and_keeps_zeros(
    way: str, pruned: Path, text: Path, tmp_path: Path, run: Any
) -> None:
    if way == "lora":
        pytest.importorskip("peft")
    out = tmp_path / "tuned"
    line = (
        "tune",
        pruned,
        "--out",
        out,
        "--calibration",
        text,
        "--way",
        way,
        "--rate",
        0.01,
        *SMALL,
    )
    told = json.loads(run(*line, "--json", exits=0)[1])
    assert told["last_loss"] < told["first_loss"]
    before, after = (
        AutoModelForCausalLM.from_pretrained(place, dtype="auto")
        for place in (pruned, out)
    )
    trained = 0
    for (name, weight), other in zip(
        before.named_parameters(), after.parameters(), strict=True
    ):
        assert weight.dtype == other.dtype
        if (weight == 0).any() and weight.ndim == 2:
            assert (other[weight == 0] == 0).all(), name
            trained += int(not torch.equal(weight, other))
    assert trained >= 7
    assert "visual.weight" in tensors_of(out)
    assert "lm_head.weight" not in tensors_of(out)  # it would be the untrained one
    values = [
        sparsellm.evaluate(place, text, seq_len=32, max_tokens=640).value
        for place in (pruned, out)
    ]
    assert values[1] < 0.9 * values[0]


def test_weights_keep_the_dtype_in_which_they_are_stored(
    pruned: Path, text: Path, tmp_path: Path, run: Any
) -> None:
    source, out = Path(shutil.copytree(pruned, tmp_path / "source")), tmp_path / "out"
    rewrite(source / "config.json", dtype="float16")
    stacked = save_tiny(
        prune_tiny(mixtral()).bfloat16(), tiny_tokenizer(), tmp_path / "experts"
    )
    inside = save_tiny(
        prune_tiny(family("Llama4")).bfloat16(), tiny_tokenizer(), tmp_path / "towers"
    )
    for model, dtype in (
        (source, torch.float32),
        (stacked, torch.bfloat16),
        (inside, torch.bfloat16),
    ):
        line = (
            "tune",
            model,
            "--out",
            out,
            "--overwrite",
            "--calibration",
            text,
            "--steps",
            1,
            "--seq-len",
            32,
        )
        run(*line, exits=0)
        assert {tensor.dtype for tensor in tensors_of(out).values()} == {dtype}
        assert tensors_of(out).keys() == tensors_of(model).keys() - (
            {"lm_head.weight"} if model == source else set()
        )


def test_what_cannot_be_tuned_is_one_line(
    pruned: Path, llama: Path, text: Path, tmp_path: Path, refusal: Any
) -> None:
    sparsellm.pack(pruned, out=tmp_path / "packed")
    recipe = Recipe(
        method="magnitude", values="int8", calibration=str(text), samples=4, seq_len=32
    )
    sparsellm.prune(llama, recipe, out=tmp_path / "int8")
    sparsellm.pack(tmp_path / "int8", out=tmp_path / "rounded", values="int8")
    for model, more, said in (
        (tmp_path / "packed", (), "unpack it first"),
        (tmp_path / "int8", (), "is rounded to int8, and training would undo that"),
        (tmp_path / "rounded", (), "is rounded to int8, and training would undo that"),
        (
            pruned,
            ("--batch", "65536", "--seq-len", "128"),
            "GB of memory, more than is free",
        ),
        (llama, (), "prune the model first"),
        *(
            [(llama, ("--way", "lora"), "prune the model first")]
            if find_spec("peft")
            else []
        ),
        (pruned, ("--calibration", f"{text}:0.99,pydoc:0.01"), "take more windows"),
        (pruned, ("--way", "half"), "--way is 'half'"),
        (pruned, ("--steps", "0"), "--steps is 0"),
        (pruned, ("--rate", "1e30"), "--rate is 1e+30"),
        (pruned, ("--calibration", "nofile"), "unknown text source"),
        (
            pruned,
            ("--calibration", "self"),
            "does not train on text that the model writes",
        ),
        (pruned, ("--seq-len", "4096"), "positions"),
    ):
        assert said in refusal(
            "tune", model, "--out", tmp_path / "o", "--calibration", text, *SMALL, *more
        )
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "int8",
            "packed",
            "rounded",
        ]


def test_weights_that_are_not_finite_are_not_written(
    pruned: Path, text: Path, tmp_path: Path, refusal: Any
) -> None:
    source, tensors = (
        Path(shutil.copytree(pruned, tmp_path / "source")),
        tensors_of(pruned),
    )
    for shard in source.glob("*.safetensors"):
        shard.unlink()
    (source / "model.safetensors.index.json").unlink()
    tensors["model.norm.weight"].fill_(3e38)  # logits are infinite
    save_file(
        {name: value.clone() for name, value in tensors.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    said = refusal(
        "tune", source, "--out", tmp_path / "o", "--calibration", text, *SMALL
    )
    assert "is not finite after training; take a lower --rate" in said
    assert not (tmp_path / "o").exists()


def test_a_seed_chooses_windows_and_memory_is_counted(
    pruned: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tuned(name: str, seed: int, batch: int = 1) -> tuple[Any, bytes]:
        training = recover.Training(steps=8, seq_len=32, seed=seed, batch=batch)
        result = recover.tune(
            str(pruned), tmp_path / name, training, str(text), lambda _: None
        )
        return result, b"".join(shards_of(tmp_path / name).values())

    (first, ones), (again, twos), (_, others) = (
        tuned("a", 0),
        tuned("b", 0),
        tuned("c", 1),
    )
    assert ones == twos != others
    assert (
        first.last_loss == again.last_loss < first.first_loss
    )  # at the rate that is the default
    windows: list[int] = []
    ahead_of(
        monkeypatch,
        recover,
        "_trained",
        lambda _, __, rows, *___: windows.append(len(rows)),
    )
    monkeypatch.setattr(recover, "MOST_WINDOWS", 8)
    assert [tuned(str(batch), 0, batch) for batch in (3, 9)]
    assert windows == [6, 9]
    monkeypatch.setattr(recover, "free_memory", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match=r"training needs .* take --way lora"):
        tuned("d", 0)
    with pytest.raises(
        MemoryBudgetError, match=r"training needs .* lower --batch or --seq-len"
    ):
        tuned("d", 0, 65)


def test_a_stopped_training_leaves_nothing(
    pruned: Path, text: Path, tmp_path: Path
) -> None:
    def stop(event: Any) -> None:
        if event.done >= 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        recover.tune(
            str(pruned),
            tmp_path / "o",
            recover.Training(steps=4, seq_len=16),
            str(text),
            stop,
        )
    assert list(tmp_path.iterdir()) == []
