"""Generation against transformers' own, and the benchmark's bookkeeping; never a time."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import sparsellm
from sparsepack import generation, native
from sparsepack.bench import (
    Rounds,
    Speed,
    check_positions,
    compare,
    measure,
    resident_bytes,
    verdict,
)
from sparsepack.decode import decodes
from sparsepack.errors import FormatError, SettingError
from sparsepack.generation import generate
from sparsepack.streaming import StreamedText
from tests.killing import ahead_of
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer

PROMPT = "The while statement"


def test_greedy_text_is_that_of_transformers_and_streams_whole(
    llama: Path, packed: Path
) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    output = AutoModelForCausalLM.from_pretrained(llama).generate(
        ids, max_new_tokens=24, do_sample=False
    )
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    for directory in (llama, packed):
        pieces: list[str] = []
        result = generate(
            sparsellm.load(directory),
            tokenizer,
            PROMPT,
            max_new_tokens=24,
            on_text=pieces.append,
        )
        assert result.text == "".join(pieces) == expected
        assert len(pieces) > 1
        assert (result.prompt_tokens, result.new_tokens) == (
            ids.shape[1],
            output.shape[1] - ids.shape[1],
        )
        assert result.tokens_per_second > 0
        assert result.to_dict()["tokens_per_second"] == result.tokens_per_second


def test_the_space_before_the_first_word_is_kept() -> None:
    """Decoders such as Llama 2's drop the space at the beginning of what they decode."""
    words = Tokenizer(
        models.WordLevel({"\u2581Once": 0, "\u2581the": 1, "s": 2}, unk_token="s")
    )
    words.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer, pieces = PreTrainedTokenizerFast(tokenizer_object=words), list[str]()
    text = StreamedText(tokenizer, [], pieces.append, lambda: False)
    for ids in ([[0]], [1], [2], [1]):
        text.put(torch.tensor(ids))
    text.end()
    assert (
        tokenizer.decode([0, 1, 2, 1])
        == "Once" + text.text
        == "Once" + "".join(pieces)
        == "Once thes the"
    )
    assert text.ids == [1, 2, 1]
    stopped = StreamedText(tokenizer, [" the"], None, lambda: False)
    for ids in ([[0]], [1]):
        stopped.put(torch.tensor(ids))
    assert (stopped.text, stopped.over) == ("", "stop")


def test_a_prompt_that_is_cut_within_a_character_spoils_none() -> None:
    """Decoders such as Llama 2's give a run of byte tokens only if all of it is characters."""
    characters = Tokenizer(
        models.WordLevel(
            {f"<0x{byte:02X}>": byte for byte in range(256)}, unk_token="<0x00>"
        )
    )
    characters.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    text = StreamedText(
        PreTrainedTokenizerFast(tokenizer_object=characters), [], None, lambda: False
    )
    ids = [*"\u6f22\u5b57\u6f22\u5b57".encode()]
    for some in (ids[:9], *([byte] for byte in ids[9:])):
        text.put(torch.tensor(some))
    assert text.text == "\u5b57"
    text = StreamedText(
        PreTrainedTokenizerFast(tokenizer_object=characters), [], None, lambda: False
    )
    for token in ids[:4]:  # a prompt of half a character
        text.put(torch.tensor([token]))
    assert text.ids == ids[1:4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("compiled", [True, False])
def test_no_default_dtype_or_random_state_of_a_program_matters(
    packed: Path, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(generation, "decodes", lambda model: False)
    model, tokenizer = sparsellm.load(packed), tiny_tokenizer()
    expected = generate(
        model, tokenizer, PROMPT, max_new_tokens=24, temperature=1.0
    ).text
    state = torch.get_rng_state()
    torch.set_default_dtype(dtype)
    try:
        assert (
            generate(model, tokenizer, PROMPT, max_new_tokens=24, temperature=1.0).text
            == expected
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    torch_draws = {
        "on_text": lambda _: torch.rand(1),
        "max_new_tokens": 24,
        "temperature": 1.0,
    }  # as another thread
    assert generate(model, tokenizer, PROMPT, **torch_draws).text == expected


class Linear(nn.Linear):
    """As other libraries call theirs, which add something."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def test_only_modules_of_torch_and_transformers_are_decoded(llama: Path) -> None:
    model = sparsellm.load(llama)
    assert decodes(model) is (native.available() is not None)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse())
    assert not decodes(model)
    model = sparsellm.load(llama)
    model.lm_head.__class__ = Linear
    assert not decodes(model)
    model = sparsellm.load(llama)
    model.lm_head = nn.Linear(
        model.config.hidden_size, model.config.vocab_size - 1, bias=False
    )
    assert not decodes(model)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_generation_leaves_the_config_of_the_model_to_other_threads(
    packed: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the compiled decoder has no memory for these positions, and transformers decodes."""
    model, seen = sparsellm.load(packed), list[Any]()
    before, expected = (
        model.generation_config,
        generate(model, tiny_tokenizer(), PROMPT).text,
    )
    if not compiled:
        refused = Mock(
            side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory")
        )
        monkeypatch.setattr(generation, "Decoder", refused)
    text = generate(
        model,
        tiny_tokenizer(),
        PROMPT,
        on_text=lambda _: seen.append(model.generation_config),
    ).text
    assert (text, {*map(id, seen)}) == (expected, {id(before)})


BAD_ARGUMENTS: list[tuple[Callable[[Path], Any], str]] = [
    (
        lambda path: sparsellm.load(path, device="cuda:9"),
        "'cuda:9' cannot be used here",
    ),
    (lambda path: compare(5), "packed"),  # type: ignore[arg-type]
    (lambda path: compare(path), "sparsellm pack"),
    (lambda path: generate("m", tiny_tokenizer(), "x"), "model is 'm'"),  # type: ignore[arg-type]
    (lambda path: generate(tiny_llama(), tiny_tokenizer(), ""), "the prompt is empty"),
    (
        lambda path: generate(tiny_llama(vocab_size=50), tiny_tokenizer(), "x"),
        "and the model has 50 tokens; resize",
    ),
    (
        lambda path: generate(tiny_llama(), tiny_tokenizer(), "\udcff"),
        "half of a surrogate pair",
    ),  # no UTF-8
    (
        lambda path: generate(tiny_llama(), tiny_tokenizer(), "x", max_new_tokens=1000),
        "the model takes 128 in all",
    ),
]


@pytest.mark.parametrize(("call", "said"), BAD_ARGUMENTS)
def test_wrong_arguments_are_one_line(
    call: Callable[[Path], Any], said: str, llama: Path
) -> None:
    with pytest.raises(SettingError, match=re.escape(said)):
        call(llama)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", "1"),
        ("eos_token_id", [10**30]),
        ("top_p", 2.0),
        ("top_k", True),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_bad_generation_config_is_named(name: str, value: Any, llama: Path) -> None:
    model = sparsellm.load(llama)
    setattr(model.generation_config, name, value)
    with pytest.raises(FormatError, match=f"generation config of the model: {name}"):
        generate(model, tiny_tokenizer(), PROMPT)


def test_other_settings_of_the_generation_config_are_ignored(llama: Path) -> None:
    model, tokenizer = sparsellm.load(llama), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPT, max_new_tokens=8)
    before = model.generation_config
    for name, value in {
        "output_hidden_states": "32",
        "return_dict_in_generate": True,
        "num_beams": 3,
    }.items():
        setattr(before, name, value)
    assert generate(model, tokenizer, PROMPT, max_new_tokens=8).text == expected.text
    assert model.generation_config is before
    before.eos_token_id = list(range(model.config.vocab_size))
    assert generate(model, tokenizer, PROMPT, max_new_tokens=8).new_tokens == 1


def test_models_take_turns_and_do_the_same_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, tuple[int, ...], int]] = []
    models = {"a": tiny_llama(), "b": tiny_gpt2()}
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append(
                (name, tuple(kwargs["input_ids"].shape), torch.get_num_threads())
            ),
            with_kwargs=True,
        )
    before = torch.get_num_threads()
    speeds = measure(
        models,
        Rounds(
            batches=[1, 3], threads=[1, 2], prompt_tokens=7, new_tokens=2, repeats=2
        ),
    )
    assert torch.get_num_threads() == before
    expected = []
    for threads, batch, _, name in itertools.product(
        (1, 2), (1, 3), range(3), "ab"
    ):  # one turn is to warm up
        expected += [(name, (batch, tokens), threads) for tokens in (7, 1, 1)]
    assert calls == expected
    assert len(speeds) == 2 * 2 * 2 * 2
    assert all(
        0 < speed.slowest <= speed.median <= speed.fastest < math.inf
        for speed in speeds
    )


def test_speeds_are_tokens_by_the_given_clock() -> None:
    """Three readings a run: before the prompt, after it, and after the decoding."""
    readings = (
        10.0 * reading * reading for reading in range(100)
    )  # 0, 10, 40 of the warm-up; 90, 160, 250 of the run
    rounds = Rounds(batches=[2], prompt_tokens=7, new_tokens=3, repeats=1)
    speeds = measure({"a": tiny_llama()}, rounds, clock=lambda: next(readings))
    assert {speed.phase: speed.median for speed in speeds} == {
        "prefill": 2 * 7 / 70,
        "decode": 2 * 3 / 90,
    }


def speed_of(model: str, rate: float, decoder: Any) -> Speed:
    rates = {"median": rate, "slowest": rate, "fastest": rate}
    return Speed(
        model=model, decoder=decoder, phase="decode", batch=1, threads=2, **rates
    )


@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (
            25.0,
            "decode, batch 1, 2 threads: packed is 2.50 times as fast as dense (25.0 tokens/s)",
        ),
        (5.0, "packed is SLOWER than dense on this machine, 0.50 times its speed"),
        (10.1, "packed is as fast as dense"),
    ],
)
def test_the_verdict_is_plain(packed: float, said: str) -> None:
    dense = speed_of("dense", 10.0, "compiled")
    assert (
        said
        in verdict(
            [
                speed_of("dense", 10.0, "transformers"),
                speed_of("packed", packed, "compiled"),
            ]
        )[0]
    )
    (line,) = verdict(
        [
            dense,
            speed_of("dense", 4.0, "transformers"),
            speed_of("packed", packed, "compiled"),
        ]
    )
    assert said in line
    assert line.endswith(
        f" by the same decoder; {packed / 4:.2f} × dense as transformers runs it"
    )


def test_the_dense_model_runs_by_both_decoders(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiled one as the packed model does, and by transformers' generate, which calls the model's forward."""
    lengths: list[int] = []
    ahead_of(
        monkeypatch,
        LlamaForCausalLM,
        "forward",
        lambda *_, **call: lengths.append(call["input_ids"].shape[1]),
    )
    report = compare(packed, batches=[1, 2], prompt_tokens=4, new_tokens=2, repeats=1)
    fast = native.available() is not None
    one, several = [pair for pair in report.pairs() if pair.packed.phase == "decode"]
    assert (one.same is one.transformers) is not fast
    assert several.same is several.transformers
    assert one.transformers.decoder == "transformers"
    assert (
        one.packed.decoder
        == one.dense.decoder
        == ("compiled" if fast else "transformers")
    )
    assert one.ratio.same_decoder == one.packed.median / one.dense.median
    assert report.ratios == [pair.ratio for pair in report.pairs()]
    assert (lengths.count(4), lengths.count(1)) == (
        (2 * 5, 2 * 3 * 2) if fast else (2 * 4, 2 * 4 * 2)
    )


def test_another_model_is_not_compared_with(packed: Path, tmp_path: Path) -> None:
    other = save_tiny(tiny_llama(num_hidden_layers=2), None, tmp_path / "other")
    said = f"dense is {other}, which is another model than {packed}: in the latter, num_hidden_layers in config.json"
    with pytest.raises(SettingError, match=re.escape(said)):
        compare(packed, other)
    with pytest.raises(
        SettingError, match="which is packed; leave it out, or unpack it"
    ):
        compare(packed, packed)
    config = json.loads((other / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "awq"}
    }
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SettingError,
        match="which is quantised; give the checkpoint that it was made from",
    ):
        compare(packed, other)


def test_compare_unpacks_the_same_model_if_no_dense_one_is_given(
    llama: Path, packed: Path
) -> None:
    for dense in (None, llama):
        report = compare(packed, dense, prompt_tokens=4, new_tokens=1, repeats=1)
        # also where the checkpoint is in float32
        assert (report.dtype, report.dense_dtype) == ("float32", "bfloat16")
        assert report.dense_linear_bytes == resident_bytes(
            sparsellm.load(llama, dtype="bfloat16"), linears_only=True
        )
        assert report.packed_linear_bytes < report.dense_linear_bytes
        assert [pair.packed.phase for pair in report.pairs()] == ["prefill", "decode"]
        assert (report.packed_name, report.dense_name) == (
            packed.name,
            dense and dense.name,
        )
        assert len(report.verdict) == 2
    with pytest.raises(SettingError, match="more than the 128"):
        compare(packed, prompt_tokens=500)
    check_positions(
        LlamaConfig(max_position_embeddings=0), Rounds(), "m"
    )  # as generate takes it: no limit


@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 48}], ids=["compiled", "by transformers"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_an_error_and_not_an_empty_text(
    changes: dict[str, int], temperature: float
) -> None:
    model = tiny_llama(**changes).eval()
    assert decodes(model) is (not changes and native.available() is not None)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FormatError, match="the model computes NaN; take dtype float32"):
        generate(model, tiny_tokenizer(), "a b", temperature=temperature)
