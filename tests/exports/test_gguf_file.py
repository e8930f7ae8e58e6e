"""GGUF by template: every tensor, dequantised, is that of the checkpoint, and what does not fit is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, RecipeError, SparseLLMError, StorageError
from sparsellm.exports import template
from sparsellm.exports.gguf_file import _remove_torn
from sparsellm.exports.template import row_order
from sparsellm.files.contents import write_list
from sparsellm.files.reader import CheckpointReader
from sparsellm.files.writer import write_shard
from sparsellm.records import read_pruning
from tests.exports.checkpoints import IDS, mixtral, pruned, wide_llama
from tests.models import converter, save_tiny, tiny_tokenizer
from tests.models.in_gguf import Kind, finish, in_gguf, write_gguf
from tests.report.pages import rewrite

OUTSIDE = ("token_embd.weight", "output.weight")  # embedding and head


@pytest.fixture(autouse=True)
def converter_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_convert", converter.called)


def exported(directory: Path, **settings: Any) -> gguf.GGUFReader:
    """The file that ``export`` writes next to a checkpoint."""
    out = directory.parent / "out.gguf"
    settings = {"converter": converter.__file__, **settings}
    sparsellm.export(directory, to="gguf", out=out, **settings)
    return gguf.GGUFReader(out)


def tensors(file: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """Every tensor in fp32."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in file.tensors
    }


def assert_is(
    file: gguf.GGUFReader, directory: Path, *, but: tuple[str, ...] = ()
) -> None:
    """Every tensor is that of the checkpoint in its dtype, in the order of a converter that is written down apart."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    dtype, there, here = model.dtype, tensors(file), in_gguf(model)
    assert there.keys() == here.keys()
    for name in there.keys() - set(but):
        assert torch.equal(
            torch.from_numpy(there[name].copy()).to(dtype).float(),
            torch.from_numpy(here[name]),
        ), name


@pytest.mark.parametrize(
    ("make", "grid"),
    [
        (wide_llama, "q4_0"),
        (lambda: wide_llama().float(), "q8_0"),
        (lambda: wide_llama().half(), "q4_0"),
        (lambda: wide_llama(tie_word_embeddings=True), "w4a16-32"),
        (mixtral, "q8_0"),
    ],
    ids=["llama", "fp32", "fp16", "tied", "mixtral"],
)
def test_every_tensor_is_that_of_the_checkpoint(
    tmp_path: Path, make: Any, grid: str
) -> None:
    directory = pruned(make(), tmp_path, grid, effort=1)  # so that norms change too
    file = exported(directory)
    assert_is(file, directory)
    types = {
        tensor.tensor_type
        for tensor in file.tensors
        if "attn_q.w" in tensor.name or "exps" in tensor.name
    }
    assert types == {Kind.Q8_0 if grid == "q8_0" else Kind.Q4_0}


@pytest.mark.parametrize(
    ("like", "dtype"),
    [
        (Kind.BF16, "auto"),
        (Kind.F16, "auto"),
        (Kind.F32, "auto"),
        (Kind.F32, "float32"),
    ],
)
def test_a_file_that_was_pruned_is_its_own_template(
    like: Kind, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where weights were rounded when it was converted, and where norms and other linears were trained."""
    directory, source = pruned_file(tmp_path, monkeypatch, like, dtype=dtype)
    assert_is(exported(directory, converter=None, like=source), directory)
    train(directory)
    file = exported(directory, converter=None, like=source, overwrite=True)
    assert_is(file, directory)


def train(directory: Path) -> None:
    """Changes a norm and a linear of a checkpoint that were not pruned."""
    for key in ("input_layernorm", "self_attn.k_proj"):
        change(directory, f"model.layers.0.{key}.weight", lambda weight: weight * 1.25)


def change(directory: Path, key: str, by: Callable[[Tensor], Tensor]) -> None:
    """Changes a tensor of a checkpoint."""
    reader = CheckpointReader(directory)
    shard = reader.file_of(key)
    held = {name: reader.get(name) for name in reader if reader.file_of(name) == shard}
    held[key] = by(held[key])
    with shard.open("wb") as file:
        write_shard(file, held)
    write_list(directory, {})


def pruned_file(
    place: Path, monkeypatch: pytest.MonkeyPatch, like: Kind, **settings: Any
) -> tuple[Path, Path]:
    """The checkpoint of a run on a GGUF file, in which k is not pruned, and that file."""
    monkeypatch.setenv("SPARSELLM_CACHE", str(place / "cache"))
    model = wide_llama().float()
    for parameter in model.parameters():
        parameter.data *= 1.001
    source = write_gguf(model, place / "like.gguf", like)
    recipe = Recipe(
        sparsity=0.5,
        grid="q4_0",
        samples=4,
        seq_len=32,
        effort=0,
        exclude=["*.k_proj"],
        **settings,
    )
    result = sparsellm.prune(source, recipe, out=place / "pruned", calibration=IDS)
    assert result.path is not None
    return result.path, source


def test_a_trained_matrix_needs_a_template_that_is_not_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, source = pruned_file(tmp_path, monkeypatch, Kind.Q8_0)
    train(directory)
    said = r"attn_k\.weight in Q8_0, and it was trained; give llama\.cpp's convert_hf_to_gguf\.py"
    with pytest.raises(ModelError, match=said):
        exported(directory, converter=None, like=source)
    assert_is(exported(directory), directory)


@pytest.mark.parametrize(
    "grid", ["q5_0", "iq4_nl", "iq4_xs", "q3_k", "q6_k", "q2_k", "q4_k"]
)
def test_linears_of_many_types_are_those_of_the_checkpoint(
    tmp_path: Path, grid: str
) -> None:
    """Rows of 256 in the type itself, those of 96 in the one that llama.cpp takes there; and the run says so."""
    model = wide_llama(
        hidden_size=256, intermediate_size=96, head_dim=64, num_hidden_layers=1
    )
    directory = pruned(model, tmp_path, grid, sparsity=0.0, effort=1)
    file = exported(directory)
    assert_is(file, directory)
    types = {tensor.name: tensor.tensor_type.name for tensor in file.tensors}
    narrow = {"iq4_xs": "IQ4_NL", "q3_k": "IQ4_NL", "q2_k": "IQ4_NL"}
    narrow |= {"q6_k": "Q8_0", "q4_k": "Q5_0"}
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_up.weight"] == grid.upper()
    assert types["blk.0.ffn_down.weight"] == narrow.get(grid, grid.upper())
    warnings = read_pruning(directory).warnings
    said = "1 of 7 linears have inputs that 256 does not divide, and are rounded to"
    assert any(said in warning for warning in warnings) is (grid in narrow)


def test_biases_are_in_the_order_of_the_converter(tmp_path: Path) -> None:
    model = wide_llama(attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0 if name.endswith("bias") else 1)
    directory = pruned(model, tmp_path, "q4_0", effort=1)
    bias = CheckpointReader(directory).get("model.layers.0.self_attn.q_proj.bias")
    assert bias.unique().numel() > 2
    half = bias.float().view(4, 2, 8).transpose(1, 2).reshape(-1)
    assert torch.equal(
        torch.from_numpy(tensors(exported(directory))["blk.0.attn_q.bias"].copy()), half
    )


@pytest.mark.parametrize(
    ("like_type", "head"),
    [(Kind.Q8_0, "keep"), (Kind.Q4_0, "keep"), (Kind.Q4_0, "q8_0")],
)
def test_a_quantised_file_keeps_its_embedding_and_head(
    like_type: Kind, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger type is not taken: it would hold the same values in more bytes."""
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "cache"))
    source = write_gguf(wide_llama(), tmp_path / "like.gguf", like_type)
    recipe = Recipe(grid="q4_0", samples=4, seq_len=32, effort=0)
    directory = sparsellm.prune(
        source, recipe, out=tmp_path / "pruned", calibration=IDS
    ).path
    assert directory is not None
    file = exported(directory, converter=None, like=source, head=head)
    assert_is(file, directory, but=OUTSIDE)
    like = {entry.name: entry for entry in gguf.GGUFReader(source).tensors}
    for tensor in file.tensors:
        if tensor.name in OUTSIDE:
            assert tensor.tensor_type == like_type
            assert np.array_equal(tensor.data, like[tensor.name].data)


def test_head_is_quantised_when_asked(tmp_path: Path) -> None:
    directory = pruned(wide_llama(), tmp_path, "q4_0", exclude=["*.v_proj"])
    file = exported(directory, head="q8_0")
    types = {tensor.name: tensor.tensor_type for tensor in file.tensors}
    assert (types["token_embd.weight"], types["output.weight"]) == (
        Kind.Q8_0,
        Kind.Q8_0,
    )
    # what is not pruned stays as it is in the template
    assert types["blk.0.attn_v.weight"] == Kind.BF16
    assert_is(file, directory, but=OUTSIDE)
    ours, theirs = (
        tensors(file)["output.weight"],
        in_gguf(AutoModelForCausalLM.from_pretrained(directory)),
    )
    assert np.array_equal(
        ours,
        gguf.dequantize(gguf.quantize(theirs["output.weight"], Kind.Q8_0), Kind.Q8_0),
    )


@pytest.mark.parametrize("head", ["q8_0", "q6_k"])
def test_values_beyond_a_type_of_gguf_are_refused(head: str, tmp_path: Path) -> None:
    model = wide_llama(hidden_size=256, num_hidden_layers=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 7] = 1e30
    directory = pruned(model, tmp_path, "q4_0")
    kind = head.upper()
    said = rf"^token_embd\.weight has 1e\+30, which {kind} of GGUF cannot hold; check"
    with pytest.raises(ModelError, match=said):
        exported(directory, head=head)
    assert not (tmp_path / "out.gguf").exists()


def test_a_head_in_q6_k_needs_rows_of_whole_blocks(tmp_path: Path) -> None:
    directory = pruned(
        wide_llama(hidden_size=256, num_hidden_layers=1), tmp_path / "wide", "q4_0"
    )
    file = exported(directory, head="q6_k")
    assert {
        tensor.name for tensor in file.tensors if tensor.tensor_type == Kind.Q6_K
    } == set(OUTSIDE)
    assert_is(file, directory, but=OUTSIDE)
    ours, theirs = (
        tensors(file),
        in_gguf(AutoModelForCausalLM.from_pretrained(directory)),
    )
    assert all(
        np.square(ours[name] - theirs[name]).sum()
        < 4e-4 * np.square(theirs[name]).sum()
        for name in OUTSIDE
    )
    with pytest.raises(
        RecipeError, match=r"rows of 64 in \S+ are not blocks of 256; leave --head out"
    ):
        exported(
            pruned(wide_llama(num_hidden_layers=1), tmp_path / "narrow", "q4_0"),
            head="q6_k",
        )
    assert not (tmp_path / "narrow" / "out.gguf").exists()


def test_keys_are_copied_and_those_of_the_file_are_new(tmp_path: Path) -> None:
    file = exported(pruned(wide_llama(), tmp_path, "q8_0"))
    keys = {
        name: field.contents()
        for name, field in file.fields.items()
        if not name.startswith("GGUF.")
    }
    like = gguf.GGUFReader(write_gguf(wide_llama(), tmp_path / "like.gguf")).fields
    same = {
        name: field.contents()
        for name, field in like.items()
        if not name.startswith("GGUF.")
    }
    assert keys.pop("general.name") == "Tiny q8_0, 50% zeros"
    assert keys.pop("general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0
    assert keys.pop("general.quantization_version") == 2
    assert keys.pop("general.quantized_by").startswith("sparsellm ")
    same.pop("general.name")
    assert keys == same
    assert str(tmp_path).encode() not in (tmp_path / "out.gguf").read_bytes()


def test_rows_are_found_in_any_order() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(40, 8, generator=generator).bfloat16()
    order = torch.randperm(40, generator=generator)
    now = torch.randn(40, 8, generator=generator)
    rows = row_order(before[order], before, now)
    assert rows is not None
    assert torch.equal(rows, order)
    assert row_order(before[order] * 2, before, now) is None


def test_equal_rows_have_an_order_only_if_they_became_equal_rows() -> None:
    before = torch.tensor([[0.0], [1.0], [0.0], [2.0]])
    there = torch.tensor([[2.0], [0.0], [0.0], [1.0]])
    now = torch.tensor([[5.0], [6.0], [5.0], [7.0]])
    rows = row_order(there, before, now)
    assert rows is not None
    assert now[rows].tolist() == [[7.0], [5.0], [5.0], [6.0]]
    assert row_order(there, before, torch.arange(4.0)[:, None]) is None
    # one row of the template that is there twice takes the place of another
    assert row_order(torch.tensor([[2.0], [0.0], [1.0], [1.0]]), before, now) is None


def other(place: Path, **changes: int) -> Path:
    """A template of another model."""
    return write_gguf(wide_llama(**changes), place / "other.gguf")


def split(place: Path) -> Path:
    writer = gguf.GGUFWriter(str(place / "split.gguf"), "llama", split_max_tensors=1)
    writer.add_block_count(2)  # more than the tensors of one file
    for name in ("a", "b"):
        writer.add_tensor(name, np.zeros(4, np.float32))
    finish(writer)
    return place / "split-00001-of-00002.gguf"


def damaged(place: Path) -> Path:
    (place / "cut.gguf").write_bytes((place / "like.gguf").read_bytes()[:3000])
    return place / "cut.gguf"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ready")
    write_gguf(wide_llama(), place / "like.gguf")
    return pruned(wide_llama(), place, "q4_0")


def pipe(place: Path) -> Path:
    """A pipe that nobody writes to."""
    path = place / "pipe"
    if not path.exists():
        os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("like", "said"),
    [
        (
            partial(other, seed=1),
            r"was not pruned from .*other\.gguf, which has another model.embed_tokens.weight",
        ),
        (split, r"is one of several files; join them with llama-gguf-split --merge"),
        (damaged, r"cut\.gguf cannot be converted: .*cut short"),
        (
            partial(other, num_hidden_layers=1),
            r"another set of tensors \(model\.layers\.1\.",
        ),
        (
            partial(other, num_hidden_layers=3),
            r"another set of tensors \(model\.layers\.2\.\S+\); give the \.gguf file",
        ),
        (lambda place: place / "none.gguf", r"none\.gguf' is not a readable GGUF file"),
        (lambda place: place, r"ready0' is not a readable GGUF file: .*directory"),
        (pipe, r"pipe' is not a readable GGUF file: .* is not an ordinary file"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(
    ready: Path,
    tmp_path: Path,
    like: Any,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARSELLM_CACHE", str(ready.parent / "cache"))
    file = like(ready.parent)
    with pytest.raises(ModelError, match=said):
        sparsellm.export(ready, to="gguf", out=tmp_path / "out.gguf", like=file)
    assert list(tmp_path.iterdir()) == []


def test_a_place_or_a_template_that_cannot_be_is_refused(
    ready: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    settings: dict[str, Any] = {"converter": converter.__file__}
    with pytest.raises(RecipeError, match=r"with --converter.*git clone .*with --like"):
        sparsellm.export(ready, to="gguf", out=out)
    with pytest.raises(RecipeError, match=r"both make a template"):
        sparsellm.export(ready, to="gguf", out=out, like="a.gguf", **settings)
    with pytest.raises(RecipeError, match=r"none\.py' is not a file; give the path of"):
        sparsellm.export(ready, to="gguf", out=out, converter="none.py")
    like = ready.parent / "like.gguf"
    sparsellm.export(ready, to="gguf", out=out, **settings)
    with pytest.raises(StorageError, match="--overwrite"):
        sparsellm.export(ready, to="gguf", out=out, **settings)
    sparsellm.export(ready, to="gguf", out=out, overwrite=True, **settings)
    (tmp_path / "notes.gguf").write_text("mine")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused = {
        "notes.gguf": "not a GGUF",
        "pipe.gguf": "not an ordinary file",
        "a.bin": "a .gguf file",
    }
    for name, said in {**refused, "no/a.gguf": "not a directory"}.items():
        with pytest.raises(StorageError, match=said):
            sparsellm.export(
                ready, to="gguf", out=tmp_path / name, overwrite=True, **settings
            )
    with pytest.raises(StorageError, match="is the template"):
        sparsellm.export(ready, to="gguf", out=like, overwrite=True, like=like)
    with pytest.raises(StorageError, match="in the checkpoint"):
        sparsellm.export(ready, to="gguf", out=ready / "a.gguf", **settings)


@pytest.mark.parametrize(
    ("settings", "to", "said"),
    [
        ({"values": "int3"}, "gguf", r"levels are uneven.*prune with --grid q4_0"),
        (
            {"values": "int6"},
            "gguf",
            r"columns have exponents, and its groups follow the zeros",
        ),
        (
            {"values": "int4"},
            "compressed-tensors",
            r"columns have exponents.*prune with --grid w4a16",
        ),
        ({}, "gguf", r"values were not rounded.*prune with --grid q4_0"),
        (
            {"grid": "w8a16"},
            "gguf",
            r"the grid w8a16, which this format does not have; prune with --grid q4_0",
        ),
    ],
)
def test_values_on_another_grid_are_refused(
    tmp_path: Path, settings: Any, to: Any, said: str
) -> None:
    directory = pruned(
        wide_llama(num_hidden_layers=1),
        tmp_path,
        settings.pop("grid", "own"),
        **settings,
    )
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    with pytest.raises(RecipeError, match=said):
        sparsellm.export(directory, to=to, out=out)
    assert not out.exists()


def test_a_checkpoint_that_prune_did_not_write_is_refused(tmp_path: Path) -> None:
    dense = save_tiny(
        wide_llama(num_hidden_layers=1), tiny_tokenizer(), tmp_path / "dense"
    )
    with pytest.raises(
        StorageError,
        match=r"no pruning\.json; give a checkpoint that `sparsellm prune --grid` wrote",
    ):
        sparsellm.export(dense, to="gguf", out=tmp_path / "out.gguf")
    directory = pruned(wide_llama(num_hidden_layers=1), tmp_path, "q4_0")
    rewrite(directory / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(SparseLLMError, match="quantised weights"):
        sparsellm.export(directory, to="compressed-tensors", out=tmp_path / "out")


def test_a_weight_that_left_its_grid_leaves_no_file(tmp_path: Path) -> None:
    directory = pruned(wide_llama(), tmp_path, "q4_0")

    def off(weight: Tensor) -> Tensor:
        weight[0, :32] = torch.linspace(0.011, 0.123, 32)
        return weight

    change(directory, "model.layers.1.mlp.down_proj.weight", off)
    with pytest.raises(StorageError, match=r"down_proj is not on the grid q4_0"):
        exported(directory)
    with pytest.raises(StorageError, match=r"down_proj is not on the grid q4_0"):
        sparsellm.export(directory, to="compressed-tensors", out=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {
        "dense",
        "pruned-q4_0",
    }


def test_what_a_killed_export_left_is_removed_and_no_more(tmp_path: Path) -> None:
    directory = pruned(wide_llama(num_hidden_layers=1), tmp_path, "q4_0")
    dead, busy, other, named = (
        tmp_path / f".{name}.tmp" for name in ("0" * 24, "1" * 24, "2" * 24, "my")
    )
    for path in (dead, busy, other, named):
        path.write_bytes(b"mine" if path is other else b"GGUF\3")
    with busy.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # as another export does
        exported(directory, progress=lambda _: _remove_torn(tmp_path))
    assert {*tmp_path.glob(".*")} == {busy, other, named}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_appears_during_an_export_stays(
    overwrite: bool, tmp_path: Path
) -> None:
    """Also with overwrite, which is about GGUF files; and no record says that there is an export."""
    directory = pruned(wide_llama(num_hidden_layers=1), tmp_path, "q4_0")
    out = tmp_path / "out.gguf"
    with pytest.raises(StorageError, match="name another file"):
        exported(
            directory,
            overwrite=overwrite,
            save=True,
            progress=lambda _: out.write_bytes(b"mine"),
        )
    assert out.read_bytes() == b"mine"
    assert not list(tmp_path.glob(".*"))
    assert not (directory / "results.json").exists()


def test_of_two_exports_into_one_name_the_later_is_refused(tmp_path: Path) -> None:
    directory = pruned(wide_llama(num_hidden_layers=1), tmp_path, "q4_0")
    out = tmp_path / "out.gguf"
    written: list[bytes] = []

    def other(_: object) -> None:
        if not written:
            written.append(b"")
            exported(directory, head="q8_0")
            written[0] = out.read_bytes()

    with pytest.raises(StorageError, match="give --overwrite to replace it"):
        exported(directory, progress=other)
    assert out.read_bytes() == written[0]
    assert written[0].startswith(b"GGUF")
    assert not list(tmp_path.glob(".*"))
