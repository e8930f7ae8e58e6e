"""Decoding by the extension against transformers' own forward, and embedding and head in int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import logits_process

import sparsellm
from by_hand import exponents_of, packed_of
from sparsellm.files.contents import write_list
from sparsepack import decode, generation, native
from sparsepack.codes import text_of_exponents
from sparsepack.compiled import instruction_sets
from sparsepack.decode import Cache, Decoder, decodes
from sparsepack.errors import FormatError, SettingError
from sparsepack.generation import Sampling
from sparsepack.module import PackedEmbedding, to_dense
from tests.models import save_tiny, tiny_gpt2, tiny_tokenizer
from tests.models.pruned import prune_tiny

kernels = pytest.mark.skipif(native.available() is None, reason="no compiled kernels")

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
}
SIZES |= {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def packed_model(
    out: Path,
    family: str = "Llama",
    *,
    values: str = "keep",
    head: str = "keep",
    exponents: bool = False,
    **given: Any,
) -> Path:
    """A packed model; ``exponents`` are those that a run has recorded for its linears."""
    torch.manual_seed(0)
    model, configuration = {
        "Llama": (LlamaForCausalLM, LlamaConfig),
        "Qwen2": (Qwen2ForCausalLM, Qwen2Config),
    }[family]
    tiny = prune_tiny(model(configuration(**{**SIZES, **given})).eval())
    source = save_tiny(tiny, tiny_tokenizer(), out / "dense")
    if exponents:
        shapes = {
            name: module.weight.shape
            for name, module in tiny.named_modules()
            if name.endswith("_proj")
        }
        linears = [
            {
                "name": name,
                "exponents": text_of_exponents(exponents_of(shape[1])),
                "shape": shape,
                "zeros": 0,
            }
            for name, shape in shapes.items()
        ]
        (source / "pruning.json").write_text(
            json.dumps({"values": values, "sparsity_asked": 0.5, "linears": linears})
        )
        write_list(source, {})
    return sparsellm.pack(source, out=out / "packed", values=values, head=head).path


@kernels
@pytest.mark.parametrize(
    ("family", "tied", "values", "head", "activations", "exponents"),
    [
        ("Llama", False, "keep", "keep", "fp32", False),
        ("Llama", True, "int8", "int8", "fp32", True),
        ("Llama", False, "int4", "keep", "int8", True),
        ("Qwen2", True, "int4", "keep", "fp32", True),
        ("Qwen2", False, "int8", "int8", "int8", True),
    ],
)
def test_logits_are_those_of_the_model(
    family: str,
    tied: bool,
    values: str,
    head: str,
    activations: str,
    exponents: bool,
    tmp_path: Path,
) -> None:
    directory = packed_model(
        tmp_path,
        family,
        tie_word_embeddings=tied,
        values=values,
        head=head,
        exponents=exponents,
    )
    model = sparsellm.load(directory, activations=activations)
    packed = model.get_submodule("model.layers.0.mlp.down_proj").packed
    if exponents:
        assert torch.equal(packed.exponents, exponents_of(packed.shape[1]))
    assert decodes(model)
    ids = torch.randint(300, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[0]
    # where sums differ in their order, a rounded activation may
    close = 1e-4 if activations == "fp32" else 1e-2
    decoder = Decoder(model, 16)
    cache = Cache(decoder, 16)
    (logits,) = cache.read(ids[:, :9])
    assert torch.allclose(logits, expected[8], atol=close)
    for position in range(9, 16):
        for token in (300, -1):
            with pytest.raises(IndexError):
                decoder.step([token], [cache])
        (logits,) = decoder.step([int(ids[0, position])], [cache])
        assert torch.allclose(logits, expected[position], atol=close)
    for caches in ([cache], [], [Cache(decoder, 2)] * 2):
        with pytest.raises(IndexError):
            decoder.step([0] * len(caches), caches)
    with pytest.raises(IndexError):
        Cache(decoder, 17)


@kernels
@pytest.mark.parametrize("values", ["keep", "int8", "int4"])
@pytest.mark.parametrize("activations", ["fp32", "int8"])
def test_sixteen_sequences_have_the_bits_of_each_alone(
    values: str, activations: str, tmp_path: Path
) -> None:
    """They begin at different lengths, and have caches of different sizes."""
    directory = packed_model(tmp_path, "Qwen2", values=values)
    model = sparsellm.load(directory, activations=activations)
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (16, 40), generator=draws)
    decoder = Decoder(model, 64, sequences=16)

    def begun(index: int) -> Cache:
        cache = Cache(decoder, 32 + index)
        list(cache.read(ids[index : index + 1, : index + 1]))
        return cache

    alone = []
    for index in range(16):
        cache = begun(index)
        for place in range(20, 24):
            logits = decoder.step([int(ids[index, place])], [cache])
        alone.append(logits[0].clone())
    for count in (2, 4, 5, 8, 16):
        caches = [begun(index) for index in range(count)]
        for place in range(20, 24):
            logits = decoder.step(ids[:count, place].tolist(), caches)
        assert torch.equal(logits, torch.stack(alone[:count])), count


@kernels
def test_a_prompt_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparsellm.load(packed_model(tmp_path))
    ids = torch.randint(300, (1, 11), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(decode, "PIECE", 4)
    cache = Cache(Decoder(model, 12), 12)
    pieces = list(cache.read(ids))
    with torch.no_grad():
        expected = model(ids).logits[0]
    assert cache.length == 11
    assert torch.allclose(torch.stack(pieces), expected[[3, 7, 10]], atol=1e-4)


@kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_a_dense_model_is_decoded_from_its_own_weights(
    family: str, dtype: str, tmp_path: Path
) -> None:
    """Weights are read in their dtype, sums are fp32: as the same model does in fp32, without a copy of its weights."""
    packed_model(tmp_path, family, tie_word_embeddings=family == "Qwen2")
    model = sparsellm.load(tmp_path / "dense", dtype=dtype)
    assert decodes(model)
    ids = torch.randint(300, (1, 16), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(model, 16)
    held = {tensor.data_ptr() for tensor in decoder._kept}
    assert {
        module.weight.data_ptr()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    } <= held
    with torch.no_grad():
        expected = (
            sparsellm.load(tmp_path / "dense", dtype=dtype).float()(ids).logits[0]
        )
    # the prompt is read by the model's own forward, in its dtype
    close = 1e-4 if dtype == "float32" else 2e-2
    cache = Cache(decoder, 16)
    (logits,) = cache.read(ids[:, :1])
    assert torch.allclose(logits, expected[0], atol=close)
    for position in range(1, 16):
        (logits,) = decoder.step([int(ids[0, position])], [cache])
        assert torch.allclose(logits, expected[position], atol=close)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", instruction_sets())
def test_keys_and_values_are_kept_in_the_dtype_of_the_model(
    kernel: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 84 numbers: many vectors of an instruction set, one, and a rest."""
    monkeypatch.setattr(native, "available", lambda: kernel)
    packed_model(tmp_path, head_dim=84, intermediate_size=200)
    model = sparsellm.load(tmp_path / "dense", dtype=dtype)
    ids = torch.randint(300, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.float()(ids).logits[0]
    model = model.to(dtype)
    decoder = Decoder(model, 24)
    cache = Cache(decoder, 24)
    assert cache.numbers.dtype == dtype
    (logits,) = cache.read(ids[:, :1])
    for position in range(1, 24):
        (logits,) = decoder.step([int(ids[0, position])], [cache])
    close = 1e-4 if dtype == torch.float32 else 2e-2
    assert torch.allclose(logits, expected[23], atol=close)
    with torch.no_grad():
        kept = model.float()(ids, use_cache=True).past_key_values.layers[1]
    assert torch.allclose(cache.numbers[1, 0].float(), kept.keys[0], atol=close)
    assert torch.allclose(cache.numbers[1, 1].float(), kept.values[0], atol=close)


@kernels
def test_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    model = sparsellm.load(packed_model(tmp_path))
    model.model.embed_tokens.weight = torch.nn.Parameter(
        model.model.embed_tokens.weight[:6].clone()
    )
    decoder = Decoder(model, 4)
    cache = Cache(decoder, 4)
    list(cache.read(torch.tensor([[5]])))
    with pytest.raises(IndexError, match="token 6 of 6 at position 1 of 4"):
        decoder.step([6], [cache])


@kernels
def test_sampled_text_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = sparsellm.load(packed_model(tmp_path)), tiny_tokenizer()
    model.generation_config.update(top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    texts = []
    for fast in (True, False):
        monkeypatch.setattr(generation, "decodes", lambda model, fast=fast: fast)
        for temperature, seed in ((0.0, 0), (1.5, 0), (1.5, 1)):
            asked = {"max_new_tokens": 12, "temperature": temperature, "seed": seed}
            results = generation.generate(model, tokenizer, "The while", **asked)
            texts.append((results.text, results.new_tokens))
    assert texts[:3] == texts[3:]
    assert texts[1] != texts[2]
    ids = tokenizer("The while", return_tensors="pt")["input_ids"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sampled = model.generate(
            ids, do_sample=True, temperature=1.5, max_new_tokens=12
        )
    assert (
        tokenizer.decode(sampled[0, ids.shape[1] :], skip_special_tokens=True)
        == texts[2][0]
    )


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(None, None, None), (5, 0.7, None), (0, 0.9, 0.05), (1, 0.5, 0.5), (5, 1.0, None), (300, None, 0.1)],
)  # fmt: skip
def test_a_token_is_drawn_as_transformers_own_steps_do(
    top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Scores have ties where only top_k cuts: which of two equal ones top_p leaves is chance."""
    ties = top_p in (None, 1.0)
    random = torch.Generator().manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    asked = Sampling(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    settings = generation.generation_settings(model, asked)
    numbers = torch.Generator().manual_seed(1)
    draw = generation._Draw(settings, numbers)
    steps: list[Any] = [logits_process.TemperatureLogitsWarper(0.7)]
    if top_k != 0:
        steps.append(logits_process.TopKLogitsWarper(top_k or 50))
    if top_p is not None:
        steps.append(logits_process.TopPLogitsWarper(top_p))
    if min_p is not None:
        steps.append(logits_process.MinPLogitsWarper(min_p))
    same_numbers = torch.Generator().manual_seed(1)
    tokens = []
    for _ in range(60):
        scores = 3 * torch.randn(1, 300, generator=random)
        if ties:
            scores = scores.mul(2).round() / 2
        drawn = draw(torch.zeros(1, 1, dtype=torch.long), scores)
        assert int(drawn.isfinite().sum()) == 1
        for step in steps:
            scores = step(None, scores)
        chances = scores.softmax(-1)
        token = torch.multinomial(chances, 1, generator=same_numbers)
        assert int(drawn.argmax()) == int(token)
        tokens.append(int(token))
    assert len(set(tokens)) > 10


@kernels
def test_what_is_not_known_is_left_to_transformers(tmp_path: Path) -> None:
    directory = packed_model(tmp_path)
    assert not decodes(tiny_gpt2())
    model = sparsellm.load(directory)
    with torch.device("meta"):  # a default device other than the CPU
        assert not decodes(model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not decodes(model)
    handle.remove()
    assert decodes(model)
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    assert not decodes(model)
    model = sparsellm.load(directory)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    assert not decodes(model)
    dense = to_dense(sparsellm.load(directory))
    assert decodes(dense)
    assert not decodes(dense.double())


def test_an_embedding_is_dense_int8_without_exponents() -> None:
    embedding = PackedEmbedding(torch.nn.Embedding(9, 64))
    for values, exponents in (("int4", None), ("int8", exponents_of(64))):
        with pytest.raises(FormatError, match="an embedding is dense, int8"):
            embedding.set_packed(
                packed_of(torch.randn(9, 64), values, "dense", exponents)
            )


@kernels
def test_activations_are_chosen_by_argument_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, ids = packed_model(tmp_path, values="int8"), torch.randint(300, (1, 5))
    results = {}
    for argument, variable in (
        ("fp32", "int8"),
        (None, "fp32"),
        ("int8", "fp32"),
        (None, ""),
    ):
        monkeypatch.setenv("SPARSELLM_ACTIVATIONS", variable)
        with torch.no_grad():
            results[argument, variable] = sparsellm.load(
                directory, activations=argument
            )(ids).logits
    exact, rounded = results["fp32", "int8"], results["int8", "fp32"]
    assert torch.equal(exact, results[None, "fp32"])
    assert torch.equal(rounded, results[None, ""])
    assert not torch.equal(exact, rounded)
    assert torch.allclose(exact, rounded, atol=0.2)
    with pytest.raises(
        SettingError, match="activations: 'int9' is unknown; choose one of int8, fp32"
    ):
        sparsellm.load(directory, activations="int9")
    monkeypatch.setenv("SPARSELLM_ACTIVATIONS", "fp16")
    with pytest.raises(SettingError, match="SPARSELLM_ACTIVATIONS: 'fp16' is unknown"):
        sparsellm.load(directory)


@kernels
def test_stop_strings_and_a_caller_end_both_paths_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = sparsellm.load(packed_model(tmp_path)), tiny_tokenizer()
    ids = tokenizer("The while", return_tensors="pt")["input_ids"]

    def outcome(calls: int = 99, **asked: Any) -> tuple[str, int, str]:
        pieces: list[str] = []
        left = iter(range(calls))
        result = generation.continuation(
            model, tokenizer, ids, generation.Sampling(max_new_tokens=30, **asked), on_text=pieces.append,
            cancelled=lambda: next(left, None) is None,
        )  # fmt: skip
        assert "".join(pieces) == result.text
        return result.text, result.new_tokens, result.finish

    for fast in (True, False):
        monkeypatch.setattr(generation, "decodes", lambda model, fast=fast: fast)
        text, tokens, finish = outcome()
        assert (tokens, finish) == (30, "length")
        for begin in range(0, len(text) - 4, 3):
            for size in (1, 4):
                stop = text[begin : begin + size]
                # half a character, until the next token says otherwise
                if "\ufffd" in stop:
                    continue
                stopped, tokens, finish = outcome(stop=(stop, "no such text"))
                assert (stopped, finish) == (text[: text.find(stop)], "stop")
                assert tokens < 30 or text.find(stop) + size == len(text)
        cut, tokens, finish = outcome(calls=4)
        assert text.startswith(cut)
        # transformers may ask before it hands out a token
        assert (tokens in (5, 6), finish) == (
            True,
            "cancelled",
        )
        model.generation_config.eos_token_id = [
            int(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
        ]
        assert outcome()[2] == "stop"
        model.generation_config.eos_token_id = 1


def test_sampling_is_what_the_model_recommends_unless_asked() -> None:
    model = tiny_gpt2()

    def used(**asked: Any) -> tuple[Any, ...]:
        made = generation.generation_settings(model, generation.Sampling(**asked))
        return made.do_sample, made.temperature, made.top_p, made.top_k

    assert used(temperature=None) == used() == (False, None, None, None)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    assert used(temperature=None) == (True, 0.6, 0.9, 20)
    assert used(temperature=0.2, top_p=0.5) == (True, 0.2, 0.5, 20)
    assert used() == (False, None, None, None)
    model.generation_config.temperature = -1.0
    with pytest.raises(
        FormatError, match="generation config of the model: temperature is"
    ):
        used(temperature=None)
