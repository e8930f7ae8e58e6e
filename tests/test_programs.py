"""A model is compressed to a size for each program, goes on after a stop, and is refused before the work."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

import sparsellm
from sparsellm import api, programs
from sparsellm.app import tables
from sparsellm.errors import ModelError, RecipeError, SparseLLMError
from sparsellm.exports import template
from sparsellm.run import form_choice
from tests.exports.checkpoints import family, logits, mixtral, wide_llama
from tests.models import converter, save_tiny, tiny_gpt2, tiny_tokenizer
from tests.models.in_gguf import Kind, write_gguf

SETTINGS: dict[str, Any] = {"samples": 4, "seq_len": 32, "effort": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and a text."""
    place = tmp_path_factory.mktemp("home")
    model = wide_llama(num_hidden_layers=1)
    save_tiny(model, tiny_tokenizer(), place / "dense")
    lines = (f"Line {n} of {n * 7919 % 1009} about {n * 31 % 97}." for n in range(300))
    (place / "text.txt").write_text("\n".join(lines))
    return place


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MEASURED_WINDOW", 32)
    monkeypatch.setattr(api, "MEASURED_TOKENS", 128)


def compress(
    home: Path, out: Path, *, recipe: dict[str, Any] | None = None, **options: Any
) -> sparsellm.CompressResult:
    settings = {**SETTINGS, "calibration": str(home / "text.txt"), **(recipe or {})}
    return sparsellm.compress(home / "dense", settings, out=out, **options)


def test_a_packed_directory_has_the_size_and_names_its_forms(
    home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = 2_195_000
    result = compress(home, out, program="sparsellm", size=asked)
    files = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert result.bytes == files <= asked
    assert result.start == f"sparsellm serve {out}"
    assert not (tmp_path / "out-pruned").exists()
    assert result.evaluation.against is not None
    run = result.run
    names = {candidate["name"] for candidate in run.allocation["candidates"]}  # type: ignore[union-attr, index]
    assert run.allocation["chosen"] in names
    assert "by linear" in names
    report = (out / "README.md").read_text()
    assert "KL" in report
    logits(out)


def test_a_size_of_auto_is_decided_by_divergence(home: Path, tmp_path: Path) -> None:
    result = compress(home, tmp_path / "out", program="sparsellm", size="auto")
    assert result.asked_bytes is None
    assert result.run.recipe["divergence"] == "Q4_K_M"
    candidates = result.run.allocation["candidates"]
    assert isinstance(candidates, list)
    divergence = {x["name"]: x["divergence"] for x in candidates}  # type: ignore[index, call-overload]
    assert divergence["by linear"] <= divergence["Q4_K_M"]
    logits(tmp_path / "out")


def test_linears_that_stay_dense_count_for_the_size(home: Path, tmp_path: Path) -> None:
    """Each linear that is left out takes 16 bits a weight from the others."""
    settings = {**SETTINGS, "calibration": str(home / "text.txt")}
    left_out = 2 * 32 * 64
    weights = 2 * 64 * 64 + left_out + 3 * 64 * 96

    def bits(exclude: list[str]) -> float:
        order = programs.ordered(
            home / "dense",
            {**settings, "exclude": exclude},
            program="vllm",
            out=tmp_path / "out",
            size="140000B",
        )
        return order.request.recipe.bits or 0

    key = "model.layers.0.self_attn.k_proj.weight"
    record = programs.LINEAR_BYTES - programs.LINES_BYTES + 5 * len(key)
    records = 8 * 2 * record
    everything = bits([]) * weights
    some = bits(["*.k_proj.*", "*.v_proj.*"]) * (weights - left_out)
    assert some == pytest.approx(everything + records - 16 * left_out)


def test_a_gguf_file_holds_the_numbers_of_the_run(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    script = converter.__file__
    least = compress(home, out, program="llama.cpp", bits=5.0, converter=script)
    # with all else than the linears, at the size of that file
    again = compress(
        home,
        out,
        program="llama.cpp",
        size=f"{least.bytes}B",
        converter=script,
        overwrite=True,
    )
    # one step of its small embedding takes 3 kB
    assert 0.96 * least.bytes < again.bytes <= least.bytes
    types = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors
    }
    for linear in again.run.linears:
        assert linear.values == linear.values.lower()
        assert linear.values.upper() in types.values()
    heads = again.run.heads
    assert types["token_embd.weight"] == heads["model.embed_tokens.weight"].upper()
    assert types["output.weight"] == heads["lm_head.weight"].upper()
    assert (tmp_path / "small.Modelfile").read_text() == "FROM ./small.gguf\n"
    # its results are those of this run
    report = (tmp_path / "small.html").read_text()
    assert "sparsellm report" in report
    assert f"{again.evaluation.value:.4g}" in report
    # it is about the file, not about the checkpoint that it was written from
    assert f"{again.bytes / 1e6:,.1f}\N{NO-BREAK SPACE}MB" in report
    assert "packing leaves them out" not in report
    assert "sparsellm report small" not in report
    assert "Bits of each linear" in report
    assert "Where the bits went" in report
    assert "Sparsity of each linear" not in report


def test_a_size_is_that_of_linears_embedding_and_head_together(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The types in which the file has them make no difference."""
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "cache"))
    model = wide_llama(num_hidden_layers=1)
    settings = {**SETTINGS, "calibration": str(home / "text.txt")}

    def room(kind: Kind) -> int:
        source = write_gguf(model, tmp_path / f"{kind.name}.gguf", kind)
        order = programs.ordered(
            source,
            settings,
            program="llama.cpp",
            out=tmp_path / "out.gguf",
            size="80000B",
        )
        return order.request.recipe.size or 0

    # norms, keys and the places of tensors
    assert 80_000 - 20_000 < room(Kind.F16) < 80_000
    assert room(Kind.Q4_0) == pytest.approx(room(Kind.F16), abs=64)


def most_of(place: Path, **options: Any) -> int:
    """The largest size that an error names, in bytes."""
    with pytest.raises(RecipeError, match="is too large") as refused:
        programs.ordered(place / "dense", SETTINGS, size="40GB", **options)
    said = re.search(r"at most ([\d,.]+) kB", str(refused.value))
    assert said is not None
    return round(1000 * float(said[1].replace(",", "")))


def test_the_largest_size_is_met_and_a_larger_one_refused(tmp_path: Path) -> None:
    model = wide_llama(hidden_size=160, intermediate_size=800, num_hidden_layers=1)
    save_tiny(model, tiny_tokenizer(), tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(4000))))
    options: dict[str, Any] = {
        "program": "llama.cpp",
        "out": tmp_path / "small.gguf",
        "converter": converter.__file__,
    }
    most = most_of(tmp_path, **options)
    # 34 bytes for 32 weights
    matrices = sum(x.numel() for x in model.parameters() if x.ndim == 2)
    assert most == pytest.approx(matrices * 34 / 32, rel=0.02)
    # all else than matrices is counted within a part of 700
    for asked in (most, round(1.008 * most)):
        result = compress(tmp_path, size=f"{asked}B", overwrite=True, **options)
        assert 0.99 * asked < result.bytes <= asked
        assert {x.values for x in result.run.linears} == {"q8_0"}
        assert {*result.run.heads.values()} == {"q8_0"}
    with pytest.raises(RecipeError, match="is too large for llama"):
        programs.ordered(
            tmp_path / "dense",
            SETTINGS,
            size=f"{round(1.011 * most)}B",
            overwrite=True,
            **options,
        )


@pytest.mark.parametrize("program", ["vllm", "sparsellm"])
def test_linears_of_the_largest_size_have_the_largest_forms(
    program: str, home: Path, tmp_path: Path
) -> None:
    most = most_of(home, program=program, out=tmp_path / "out")
    for asked in (most, round(1.009 * most)):
        order = programs.ordered(
            home / "dense",
            {**SETTINGS, "calibration": str(home / "text.txt")},
            program=program,  # type: ignore[arg-type]
            out=tmp_path / "out",
            size=f"{asked}B",
        )
        chosen = programs.choose_forms(order, lambda _: None)
        largest = {"vllm": "w8a16", "sparsellm": "int8"}[program]
        assert {*chosen.values.values()} == {largest}


def test_a_size_is_that_of_the_model_without_experts(tmp_path: Path) -> None:
    model = mixtral(num_hidden_layers=1)
    save_tiny(model, tiny_tokenizer(), tmp_path / "dense")
    out = tmp_path / "out"
    most = most_of(tmp_path, program="vllm", out=out)
    with pytest.raises(RecipeError, match="at most") as refused:
        programs.ordered(
            tmp_path / "dense",
            {**SETTINGS, "experts": 2},
            program="vllm",
            out=out,
            size=f"{most}B",
        )
    said = re.search(r"at most ([\d,.]+) kB", str(refused.value))
    assert said is not None
    fewer = round(1000 * float(said[1].replace(",", "")))
    rows = 2 * 96 + 64
    weights = 3 * 64 * 96
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    records = 3 * (programs.LINEAR_BYTES + 8 * len(key))
    removed = 2 * (weights + 2 * rows + records + 2 * 64)
    assert most - fewer == pytest.approx(removed, abs=200)


@pytest.mark.parametrize(
    ("program", "end", "forms"),
    [
        ("llama.cpp", "least", {"iq4_nl"}),
        ("llama.cpp", "most", {"q8_0"}),
        # experts have one form, and 96 inputs of down_proj have no groups of 64
        ("vllm", "least", {"w4a16-64", "w4a16-32"}),
        ("vllm", "most", {"w8a16"}),
    ],
)
def test_a_dry_run_takes_the_sizes_of_the_model_without_experts(
    program: programs.ProgramName,
    end: str,
    forms: set[str],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At either end of their range each linear has its smallest or its largest form."""
    monkeypatch.setattr(template, "_convert", converter.called)
    save_tiny(mixtral(num_hidden_layers=1), tiny_tokenizer(), tmp_path / "dense")
    recipe = {**SETTINGS, "calibration": str(home / "text.txt"), "experts": 2}
    options: dict[str, Any] = {"program": program, "out": tmp_path / "small"}
    if program == "llama.cpp":
        options |= {"out": tmp_path / "a.gguf", "converter": converter.__file__}
    asked = {"least": "1kB", "most": "1GB"}[end]
    with pytest.raises(RecipeError) as refused:
        programs.ordered(tmp_path / "dense", recipe, size=asked, **options)
    said = re.search(rf"at {end} ([\d,.]+) kB", str(refused.value))
    assert said is not None
    size = round(1000 * float(said[1].replace(",", "")))
    order = programs.ordered(tmp_path / "dense", recipe, size=f"{size}B", **options)
    told: list[str] = []
    chosen = programs.choose_forms(order, lambda event: told.append(event.detail))
    assert {*chosen.values.values()} == forms
    assert sum("the whole mixture" in line for line in told) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_linears_are_looked_at_once_before_the_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def look(program: str, *_: Any) -> None:
        looked.append(program)

    for module in (programs, form_choice):
        monkeypatch.setattr(module, "check_forms", look)
    out = tmp_path / "out"
    programs.ordered(home / "dense", SETTINGS, program="vllm", out=out, bits=6.0)
    assert looked == ["vllm"]


def test_a_model_that_is_not_converted_is_refused_at_once(
    home: Path, tmp_path: Path
) -> None:
    script = tmp_path / "convert.py"
    script.write_text("raise SystemExit('Model Odd is not supported')")
    said = r"convert\.py cannot convert .*dense: 'Model Odd is not supported'; install"
    with pytest.raises(ModelError, match=said):
        compress(
            home,
            tmp_path / "a.gguf",
            program="llama.cpp",
            bits=5.0,
            converter=script,
        )
    assert [*tmp_path.iterdir()] == [script]


def test_what_vllm_does_not_load_is_refused_at_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would end with the same words, after hours."""
    save_tiny(tiny_gpt2(n_embd=64, n_inner=96), tiny_tokenizer(), tmp_path / "gpt2")
    recipe = {**SETTINGS, "calibration": str(home / "text.txt")}

    def refused(model: Path, match: str) -> None:
        with pytest.raises(SparseLLMError, match=match):
            sparsellm.compress(
                model, recipe, program="vllm", bits=6.0, out=tmp_path / "out"
            )

    refused(tmp_path / "gpt2", "c_attn is a Conv1D, .*take --for llama.cpp")
    stacked = family("GptOss")
    save_tiny(stacked, tiny_tokenizer(), tmp_path / "stacked")
    refused(tmp_path / "stacked", "gate_proj has no tensor of its own")
    library = "compressed_tensors.compressors.pack_quantized"
    monkeypatch.setitem(sys.modules, library, None)
    refused(home / "dense", "pip install compressed-tensors")
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2", "stacked"}


def test_a_directory_for_vllm_fills_its_size(tmp_path: Path) -> None:
    model = wide_llama(hidden_size=128, intermediate_size=384, num_hidden_layers=8)
    save_tiny(model, tiny_tokenizer(), tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(4000))))
    asked = 1_100_000
    result = compress(
        tmp_path,
        tmp_path / "out",
        program="vllm",
        size=f"{asked}B",
        recipe={"effort": 1},
    )
    assert 0.99 * asked < result.bytes <= asked


def test_the_last_lines_say_what_of_the_size_is_left(
    home: Path, tmp_path: Path, run: Any
) -> None:
    line = ("compress", home / "dense", "--for", "vllm", "--size", "134000B")
    options = ("--samples", 4, "--seq-len", 32, "--calibration", home / "text.txt")
    out = tmp_path / "out"
    _, stdout, _ = run(*line, *options, "--effort", 0, "--out", out, exits=0)
    left = 1 - programs.bytes_of(out) / 134_000
    assert left > 0.01
    said = " ".join(stdout.split())
    assert f"asked for 0 MB, of which the chosen forms leave {left:.1%}" in said


def test_vllm_gets_groups_of_linears_with_fused_ones_alike(
    home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = compress(home, out, program="vllm", bits=6.5)
    values = {linear.name: linear.values for linear in result.run.linears}
    block = "model.layers.0"
    for fused in ("self_attn.{}_proj:q,k,v", "mlp.{}_proj:gate,up"):
        name, _, parts = fused.partition(":")
        kinds = {values[f"{block}.{name.format(part)}"] for part in parts.split(",")}
        assert len(kinds) == 1, fused
    assert len({*values.values()}) == 2
    dense = logits(home / "dense")
    assert float((logits(out) - dense).norm() / dense.norm()) < 0.25


def stop_before_packing(home: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stopping:
        stopping.setattr(programs, "pack", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(home, out, program="sparsellm", bits=4.5)


def test_the_same_call_goes_on_from_a_complete_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_before_packing(home, out, monkeypatch)
    assert (tmp_path / "out-pruned" / "pruning.json").is_file()
    with monkeypatch.context() as once:
        once.setattr(programs, "prune", lambda *_, **__: 1 / 0)
        assert compress(home, out, program="sparsellm", bits=4.5).path == out


def test_a_complete_run_that_removed_experts_is_known_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(mixtral(num_hidden_layers=1), tiny_tokenizer(), tmp_path / "dense")
    recipe = {**SETTINGS, "calibration": str(home / "text.txt"), "experts": 2}

    def again(**changes: Any) -> sparsellm.CompressResult:
        return sparsellm.compress(
            tmp_path / "dense",
            {**recipe, **changes},
            program="vllm",
            out=tmp_path / "out",
            bits=6.0,
        )

    between = tmp_path / "out-pruned-experts"
    with monkeypatch.context() as stopping:
        stopping.setattr("sparsellm.run.prune.clean_up", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again()
    assert (between / "experts.json").is_file()
    with monkeypatch.context() as stopping:
        stopping.setattr(programs, "export", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again()
    assert not between.exists()
    # neither with other experts nor with other settings of the run
    for changes in ({"experts": 3}, {"expert_refit": False}, {"effort": 1}):
        with pytest.raises(SparseLLMError, match="out-pruned"):
            again(**changes)
    with monkeypatch.context() as once:
        once.setattr(programs, "prune", lambda *_, **__: 1 / 0)
        result = again()
    assert [len(mixture.kept) for mixture in result.run.experts] == [2]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"dense", "out", "out.html"}
    logits(tmp_path / "out")


def test_a_stop_after_the_result_was_written_loses_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "small.gguf"
    options: dict[str, Any] = {"bits": 5.0, "converter": converter.__file__}
    with monkeypatch.context() as stopping:
        stopping.setattr(programs, "clean_up", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(home, out, program="llama.cpp", **options)
    written = out.read_bytes()
    compress(home, out, program="llama.cpp", **options)
    assert out.read_bytes() == written
    names = {out.name, "small.Modelfile", "small.html"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_modelfile_of_the_user_stays(home: Path, tmp_path: Path) -> None:
    (tmp_path / "small.Modelfile").write_text("mine")
    with pytest.raises(RecipeError, match="Modelfile exists"):
        compress(
            home,
            tmp_path / "small.gguf",
            program="llama.cpp",
            bits=5.0,
            converter=converter.__file__,
        )
    assert (tmp_path / "small.Modelfile").read_text() == "mine"


def test_a_page_of_the_user_stays(home: Path, tmp_path: Path) -> None:
    (tmp_path / "small.html").write_text("mine")
    out = tmp_path / "small.gguf"
    with pytest.raises(SparseLLMError, match=r"small\.html' is not a report"):
        compress(
            home,
            out,
            program="llama.cpp",
            bits=5.0,
            converter=converter.__file__,
        )
    assert (tmp_path / "small.html").read_text() == "mine"


@pytest.mark.parametrize("program", ["llama.cpp", "sparsellm", "transformers"])
@pytest.mark.parametrize("out", ["/", "."])
def test_a_place_without_a_name_is_refused(
    out: str, program: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"program": program}
    if program != "transformers":
        options["bits"] = 5.0
    if program == "llama.cpp":
        options["converter"] = converter.__file__
    with pytest.raises(RecipeError, match=f"--out '{out}' has no name of its own"):
        compress(home, out, **options)  # type: ignore[arg-type]


def test_another_complete_run_is_not_taken(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_before_packing(home, out, monkeypatch)
    with pytest.raises(SparseLLMError, match="out-pruned"):
        compress(home, out, program="sparsellm", bits=6.0)


def test_transformers_gets_a_sparsity(home: Path, tmp_path: Path) -> None:
    recipe = {**SETTINGS, "calibration": str(home / "text.txt"), "sparsity": 0.6}
    result = sparsellm.compress(
        home / "dense", recipe, program="transformers", out=tmp_path / "out"
    )
    assert result.run.sparsity_pruned == pytest.approx(0.6, abs=0.001)
    logits(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"program": "vllm"}, "needs a size"),
        ({"program": "vllm", "size": "4GB", "bits": 4.0}, "give one"),
        ({"program": "transformers", "size": "4GB"}, "give a sparsity"),
        ({"program": "sparsellm", "size": "1MB"}, "at least 2.* kB are possible"),
        ({"program": "sparsellm", "bits": 0.5}, "at least .* are possible"),
        ({"program": "sparsellm", "size": "4GB"}, "is too large .*; give at most that"),
        ({"program": "vllm", "size": "4GB"}, "for vllm: at most 1.* kB are possible"),
        # w8a16 has 16 bits for each of 448 rows, of 30,720 weights
        ({"program": "vllm", "bits": 8.4}, r"at most 8\.234 are possible"),
        ({"program": "sparsellm", "bits": 15.9}, "bits 15.9 are too large for"),
        ({"program": "llama.cpp", "bits": 4.5}, "give it with --converter.*git clone"),
        (
            {"program": "llama.cpp", "bits": 4.5, "converter": "no.py"},
            "'no.py' is not a file",
        ),
        ({"program": "vllm", "bits": 4.5, "converter": "x.py"}, "leave it out"),
        ({"program": "ollama", "bits": 4.5}, "program"),
        ({"program": "vllm", "size": "auto:x"}, "'auto:x' names no divergence"),
        ({"program": "vllm", "size": "auto:-1"}, "such as auto:0.05"),
        ({"program": "vllm", "size": "auto", "bits": 4.5}, "give one"),
        ({"program": "transformers", "size": "auto"}, "give a sparsity"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_the_work(
    options: dict[str, Any], said: str, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / ("out.gguf" if options["program"] == "llama.cpp" else "out")
    with pytest.raises(RecipeError, match=said):
        compress(home, out, **options)
    assert not [*tmp_path.iterdir()]


def test_without_a_program_the_four_are_listed(
    home: Path, tmp_path: Path, run: Any
) -> None:
    line = ("compress", home / "dense", "--out", tmp_path / "out")
    _, _, stderr = run(*line, exits=2)
    assert "give --for and one of llama.cpp, vllm, sparsellm, transformers" in stderr
    for name, program in programs.PROGRAMS.items():
        assert f"--for {name}: {program.keeps}" in stderr


def test_a_dry_run_prints_the_choice_and_writes_nothing(
    home: Path, tmp_path: Path, run: Any
) -> None:
    line = ("compress", home / "dense", "--for", "sparsellm", "--bits", 4.5)
    options = ("--samples", 4, "--seq-len", 32, "--calibration", home / "text.txt")
    _, stdout, _ = run(
        *line, *options, "--out", tmp_path / "out", "--dry-run", columns=80, exits=0
    )
    assert "down_proj" in stdout
    assert re.search(r"^down_proj  \d$", stdout, re.MULTILINE)
    assert "taken" in stdout
    assert not [*tmp_path.iterdir()]


def test_bits_stand_block_after_block_by_kind() -> None:
    values = {f"model.layers.{n}.mlp.up_proj": f"int{3 + n % 2}" for n in range(70)}
    values["model.layers.1.attn.q_proj"] = "iq4_xs"
    for number, form in enumerate(("q6_k", "q8_0", "q8_0")):
        values[f"model.layers.2.mlp.experts.{number}.w1"] = form
    first, rest, *others = tables.bars_of_bits(values)
    assert (first, rest) == ("up_proj  " + "34" * 30, "up_proj  " + "34" * 5)
    assert others[0] == "q_proj   ·4" + "·" * 58
    assert others[2] == "w1       ··8" + "·" * 57
    assert all(len(line) <= 80 for line in (first, rest, *others))
