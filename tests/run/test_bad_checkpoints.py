"""Checkpoints that are damaged, or of which the parts do not fit: one line that says so, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sparsellm
import sparsepack
from sparsellm import Recipe
from sparsellm.errors import DataError, ModelError, SparseLLMError, StorageError
from sparsellm.model import open_chain
from sparsepack.errors import FormatError
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.report.pages import rewrite

CPU = torch.device("cpu")
IDS = torch.arange(96).view(4, 24)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
Break = Callable[[Path], None]


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refused(
    directory: Path,
    out: Path,
    kind: type[SparseLLMError],
    *said: str,
    calibration: Any = IDS,
) -> None:
    """A run ends in one line, and leaves nothing behind."""
    before = {
        path: path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    with pytest.raises(kind) as caught:
        sparsellm.prune(
            directory,
            Recipe(method="magnitude", samples=2, seq_len=24),
            out=out,
            calibration=calibration,
        )
    assert not list(out.parent.glob(f"{out.name}*"))
    assert before == {
        path: path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    assert len(str(caught.value)) < 800
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_a_head_of_its_own_under_a_config_that_ties_it(
    copy: Path, tmp_path: Path
) -> None:
    """transformers leaves such weights apart, so tying them would prune another model."""
    config(tie_word_embeddings=True)(copy)
    said = (
        "model.embed_tokens.weight and lm_head.weight of",
        "set tie_word_embeddings to false",
    )
    refused(copy, tmp_path / "out", SparseLLMError, *said)
    weights = load_file(copy / WEIGHTS)
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        copy / WEIGHTS,
    )
    config(return_dict=False)(copy)  # with it, transformers runs no Llama
    assert sparsellm.evaluate(copy, IDS).value > 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_memory_is_saved_with_the_head_that_it_has(
    tied: bool, tmp_path: Path
) -> None:
    model = tiny_llama(tie_word_embeddings=not tied)
    weight = model.model.embed_tokens.weight
    model.lm_head.weight = (
        weight if tied else torch.nn.Parameter(weight.detach().flip(0))
    )
    recipe = Recipe(method="magnitude", samples=2, seq_len=24)
    out = sparsellm.prune(model, recipe, out=tmp_path / "p", calibration=IDS).path
    for place in (out, sparsellm.pack(out, out=tmp_path / "packed").path):
        assert torch.allclose(
            AutoModelForCausalLM.from_pretrained(place)(IDS).logits,
            model(IDS).logits,
            atol=1e-4,
        )
    assert model.config.tie_word_embeddings is not tied


def config(**changes: Any) -> Break:
    return lambda directory: rewrite(directory / "config.json", **changes) and None


def content(file: str, data: bytes) -> Break:
    return lambda directory: (directory / file).write_bytes(data) and None


CONFIGS: dict[str, tuple[Break, str]] = {
    "not JSON": (content("config.json", b"{"), "not valid JSON"),
    "no model": (content("config.json", b'{"model_type": "nonesuch"}'), "cannot read"),
    "huge vocabulary": (config(vocab_size=10**12), "vocab_size 1000000000000"),
    "another vocabulary": (config(vocab_size=299), "its config asks for (299, 32)"),
    "100,000 layers": (
        config(num_hidden_layers=100_000),
        "says num_hidden_layers 100000",
    ),
    "a layer too many": (
        config(num_hidden_layers=4),
        "model.layers.3.self_attn.q_proj.weight of the model of",
    ),
    "a layer too few": (
        config(num_hidden_layers=2),
        "says 2 layers, the weights have 3",
    ),
    "unknown activation": (config(hidden_act="nonesuch"), "nonesuch"),
    "text config of another family": (
        config(text_config={"hidden_size": 32}),
        "text_config",
    ),
    "an adapter": (content("adapter_config.json", b"{}"), "merge the adapter first"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised",
    ),
}


def index(weight_map: Any, data: bytes | None = None) -> Break:
    def change(directory: Path) -> None:
        (directory / WEIGHTS).rename(directory / "one.safetensors")
        (directory / INDEX).write_bytes(
            json.dumps({"weight_map": weight_map}).encode() if data is None else data
        )

    return change


INDICES: dict[str, tuple[Break, str]] = {
    "not JSON": (index(None, b"{"), "not valid JSON"),
    "no map": (index(None, b"{}"), "no weight_map"),
    "elsewhere": (index({"a": f"../model/{WEIGHTS}"}), "names the shard"),
}


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header(text: Any, data: int, length: int | None = None) -> Break:
    encoded = text if isinstance(text, bytes) else json.dumps(text).encode()
    return content(
        WEIGHTS,
        struct.pack("<Q", len(encoded) if length is None else length)
        + encoded
        + bytes(data),
    )


ONE = entry("F32", [2], 0, 8)
HEADERS: dict[str, tuple[Break, str]] = {
    "empty": (content(WEIGHTS, b""), "not a readable safetensors file"),
    "deep": (header(b'{"a":' * 10_000, 8), "not a readable safetensors file"),
    "cut short": (header({"a": ONE}, 7), "not a readable safetensors file"),
    "dtype of tomorrow": (header({"a": entry("F4", [8], 0, 4)}, 4), "tensor a"),
}
CONFIGS["other weights"] = header({"a": ONE}, 8), "config.json"
FILES = {
    "config": (CONFIGS, ModelError),
    "index": (INDICES, StorageError),
    "header": (HEADERS, StorageError),
}


@pytest.mark.parametrize(
    ("file", "case"),
    [(file, case) for file, (cases, _) in FILES.items() for case in cases],
)
def test_a_damaged_file_is_named_in_a_line(
    file: str, case: str, copy: Path, tmp_path: Path
) -> None:
    cases, kind = FILES[file]
    damage, said = cases[case]
    damage(copy)
    refused(copy, tmp_path / "p", kind, said)


def test_generate_says_what_an_index_lacks(copy: Path) -> None:
    index(dict.fromkeys(load_file(copy / WEIGHTS), "one.safetensors"))(copy)
    with pytest.raises(FormatError, match=r"index\.json has no metadata, .* add"):
        sparsepack.load(copy)
    rewrite(copy / INDEX, metadata={})
    assert sparsepack.load(copy)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("layers", [100_000, 4])
def test_generate_builds_no_layers_without_weights(layers: int, copy: Path) -> None:
    config(num_hidden_layers=layers)(copy)
    said = (
        f"says num_hidden_layers {layers}"
        if layers > 4
        else r"weight model\.layers\.3\.input_layernorm\.weight of"
    )
    with pytest.raises(FormatError, match=said):
        sparsepack.load(copy)


@pytest.mark.parametrize("named", [None, "one", "two"])
def test_a_tensor_in_two_files_is_refused(
    named: str | None, copy: Path, tmp_path: Path
) -> None:
    """Also if the index names one of the files for it: transformers takes the one that it reads last."""
    (copy / WEIGHTS).rename(copy / "one.safetensors")
    tensors = load_file(copy / "one.safetensors")
    twice = {"other": torch.zeros(2), Q_PROJ: torch.zeros_like(tensors[Q_PROJ])}
    save_file(twice, copy / "two.safetensors")
    if named is not None:
        weight_map = dict.fromkeys(tensors, "one.safetensors")
        weight_map |= {"other": "two.safetensors", Q_PROJ: f"{named}.safetensors"}
        index = {"metadata": {}, "weight_map": weight_map}
        (copy / INDEX).write_text(json.dumps(index))
    said = f"tensor {Q_PROJ} is in both one.safetensors and two.safetensors"
    refused(copy, tmp_path / "p", SparseLLMError, said)
    with pytest.raises(FormatError, match=said):
        sparsepack.load(copy)


def test_an_index_next_to_the_one_file_counts_for_nothing(copy: Path) -> None:
    """As in transformers, whose save_pretrained leaves the index of the shards that it replaces."""
    expected = load_file(copy / WEIGHTS)
    save_file(
        {name: torch.zeros_like(value) for name, value in expected.items()},
        copy / "old.safetensors",
    )
    (copy / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(expected, "old.safetensors")})
    )
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(copy).state_dict()[Q_PROJ],
        expected[Q_PROJ],
    )
    assert torch.equal(open_chain(copy, device=CPU).parameter(Q_PROJ), expected[Q_PROJ])


@pytest.mark.parametrize(
    "name", [Q_PROJ, "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize(
    "dtype",
    [
        "float8_e4m3fn",
        "uint16",
    ],
)
def test_weights_of_other_dtypes_are_named_before_the_work(
    dtype: str, name: str, copy: Path, tmp_path: Path
) -> None:
    tensors = load_file(copy / WEIGHTS)
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    save_file(tensors, copy / WEIGHTS)
    refused(
        copy, tmp_path / "p", ModelError, f"weight {name} in", f"is stored as {dtype};"
    )


def test_so_are_those_of_a_model_in_memory() -> None:
    model = tiny_llama()
    model.model.norm.weight = torch.nn.Parameter(
        model.model.norm.weight.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(
        ModelError, match=r"model\.norm\.weight in the model is stored as float8_e4m3fn"
    ):
        sparsellm.prune(model, Recipe(method="magnitude"), calibration=IDS)


def test_tensors_that_the_model_does_not_use_are_told(
    copy: Path, tmp_path: Path
) -> None:
    save_file(
        {**load_file(copy / WEIGHTS), "score.weight": torch.ones(64, 64)},
        copy / WEIGHTS,
    )
    result = sparsellm.prune(
        copy, Recipe(method="magnitude"), out=tmp_path / "p", calibration=IDS
    )
    assert (
        "does not use score.weight (7.3% of the checkpoint's bytes); copied as they are"
        in result.warnings[0]
    )


def test_buffers_of_older_releases_do_not_matter(tmp_path: Path) -> None:
    directory = save_tiny(tiny_gpt2(), None, tmp_path / "model")
    tensors = load_file(directory / WEIGHTS)
    # in the hub's gpt2 they are a tenth of all numbers
    for name in (
        "bias",
        "masked_bias",
        "rotary_emb.inv_freq",
    ):
        tensors[f"transformer.h.1.attn.{name}"] = torch.ones(1, 1, 128, 128)
    save_file(tensors, directory / WEIGHTS)
    assert open_chain(directory, device=CPU).unused() == []


def test_layers_that_guess_further_tokens_do_not_count(copy: Path) -> None:
    """They come behind the last layer, and transformers leaves them aside."""
    tensors = load_file(copy / WEIGHTS)
    extra = {
        name.replace("layers.2", "layers.3"): value.clone()
        for name, value in tensors.items()
        if "rs.2." in name
    }
    save_file({**tensors, **extra}, copy / WEIGHTS)
    with pytest.raises(ModelError, match="says 3 layers, the weights have 4"):
        open_chain(copy, device=CPU)
    config(num_nextn_predict_layers=1)(copy)
    assert len(open_chain(copy, device=CPU)) == 3


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    """What matters is what it makes of the text: tokens that never occur may be beyond."""
    text = tmp_path / "text.txt"
    text.write_text("plain words, again and again. " * 40)
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_tokens(["\u2603\u2603"])
    assert len(tokenizer) == 301
    directory = save_tiny(tiny_llama(), tokenizer, tmp_path / "model")
    recipe = Recipe(method="magnitude", samples=2, seq_len=24, calibration=str(text))
    assert sparsellm.prune(directory, recipe, out=tmp_path / "p").sparsity > 0
    text.write_text("snow \u2603\u2603 falls " * 60)
    said = "ids up to 300 ('\u2603\u2603'), and the model has 300 tokens"
    refused(directory, tmp_path / "q", DataError, said, calibration=str(text))
    with pytest.raises(DataError, match="ids up to 300"):
        sparsellm.evaluate(directory, str(text), seq_len=24)


def test_of_a_hub_model_the_config_comes_first_and_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = save_tiny(tiny_llama(), None, tmp_path / "hub")
    asked = Mock(return_value=str(place))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    sparsellm.prune(
        "owner/name", Recipe(method="wanda"), out=tmp_path / "p", calibration=IDS
    )
    config, weights = (call.kwargs for call in asked.call_args_list)
    assert config["allow_patterns"] == ["config.json", "*.py"]
    names = ["pytorch_model.bin", "consolidated.safetensors", "fp16/x.safetensors"]
    needed = [
        "model.safetensors",
        "tokenizer.json",
        "LICENCE",
        "COPYING",
        "USE_POLICY.md",
        "bpe.codes",
        "a.tiktoken",
    ]
    assert [
        *huggingface_hub.utils.filter_repo_objects([*names, *needed], **weights)
    ] == needed
    (place / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'
    )
    with pytest.raises(ModelError):
        sparsellm.prune(
            "owner/name", Recipe(method="wanda"), out=tmp_path / "q", calibration=IDS
        )
    assert asked.call_count == 3  # what the config refuses is not downloaded


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(
        ModelError,
        match="a LlamaModel, without a head; load it by AutoModelForCausalLM",
    ):
        sparsellm.prune(tiny_llama().model, Recipe(method="wanda"), calibration=IDS)


DAMAGED = {
    "not JSON": ("tokenizer.json", b"{", "no readable tokenizer"),
    "deep": ("tokenizer.json", b'{"a":' * 50_000, "no readable tokenizer"),
    "fails when it is used": (
        "tokenizer_config.json",
        b'{"model_max_length": []}',
        "no readable tokenizer",
    ),
    "its settings": (
        "tokenizer_config.json",
        b"{",
        "tokenizer_config.json is not valid JSON",
    ),
    "what transformers would ignore": (
        "generation_config.json",
        b"{",
        "generation_config.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tokenizer_is_named(case: str, copy: Path, tmp_path: Path) -> None:
    name, data, said = DAMAGED[case]
    (copy / name).write_bytes(data)
    refused(copy, tmp_path / "p", ModelError, said, calibration=None)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_pipe_among_the_files_of_a_tokenizer_is_named(
    name: str, copy: Path, tmp_path: Path
) -> None:
    """Nobody writes to it, so that reading it would never end."""
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    said = f"{name} is not an ordinary file"
    refused(copy, tmp_path / "p", ModelError, said, calibration=None)
