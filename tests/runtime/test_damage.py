"""Packed checkpoints that were damaged: every door refuses them, and no wrong number is written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm import cli
from sparsellm.errors import SparseLLMError, StorageError
from sparsellm.storage.packed_reader import PackedReader
from sparsellm.storage.reader import CheckpointReader
from sparsepack import PackError
from sparsepack.checkpoint import manifest, read_config
from tests.models import save_tiny, tiny_gpt2, tiny_llama
from tests.models.pruned import prune_tiny

UP = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, Any]], Any]


def copy(packed: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    return Path(shutil.copytree(packed, out))


def copy_without_config_digest(packed: Path, out: Path) -> Path:
    """A copy whose ``packed.json`` does not cover ``config.json``, as it was at first."""
    directory = copy(packed, out)
    listed = json.loads((directory / "packed.json").read_text())
    del listed["quantization_config_sha256"]
    (directory / "packed.json").write_text(json.dumps(listed))
    return directory


def change_config(directory: Path, change: Change) -> None:
    config = read_config(directory)
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def change_tensor(directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    """Changes one tensor, or removes it where ``change`` is None, and removes ``packed.json``."""
    (directory / "packed.json").unlink(missing_ok=True)
    file = CheckpointReader(directory).file_of(name)
    held = load_file(file)
    tensor = held.pop(name)
    if change is not None:
        held[name] = change(tensor)
    save_file(held, file, {"format": "pt"})  # type: ignore[no-untyped-call]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def refused(directory: Path, *said: str) -> None:
    """By every door, with this library's error in one line; ``unpack`` leaves nothing behind."""
    out = directory.parent / "unpacked"
    before = sorted(directory.parent.iterdir())
    for open_it in (
        sparsellm.load,
        AutoModelForCausalLM.from_pretrained,
        lambda path: sparsellm.unpack(path, out=out),
    ):
        with pytest.raises((PackError, SparseLLMError)) as raised:
            open_it(directory)
        assert all(part in str(raised.value) for part in said), str(raised.value)
        assert "\n" not in str(raised.value)
    assert sorted(directory.parent.iterdir()) == before


def test_a_changed_or_missing_file_is_found_by_its_checksum(packed: Path, tmp_path: Path) -> None:
    directory = copy(packed, tmp_path / "p")
    victim = sorted(directory.glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    refused(directory, victim.name, "SHA-256")
    directory = copy(packed, tmp_path / "p")
    listed = json.loads((directory / "packed.json").read_text())
    assert listed == manifest(directory)
    name, digest = next(iter(listed["sha256"].items()))
    for wrong, said in (
        ({**listed, "sha256": {"../x": digest}}, "checksums"),
        ({**listed, "sha256": {name: "0"}}, "checksums"),
        ({**listed, "sha256": {**listed["sha256"], "x.safetensors": digest}}, "x.safetensors"),
        ({**listed, "sha256": {"x" * 300: digest}}, "xxx"),
        ({**listed, "sha256": {"x\n": digest}}, "x\\n"),
        ({**listed, "sha256": {name: digest}}, "does not list"),
        ({**listed, "format_version": 99}, "format version 99"),
        ([], "object"),
    ):
        (directory / "packed.json").write_text(json.dumps(wrong))
        refused(directory, said)
    (directory / "packed.json").write_text("{")
    refused(directory, "packed.json", "JSON")


CONFIGS: dict[str, tuple[Change, str]] = {
    "a version to come": (lambda config: config.update(format_version=99), "99"),
    "int4 of the first version": (
        lambda config: (config.update(format_version=1), config["linears"][UP].update(value_type="int4")),
        "format version 1",
    ),
    "no version": (lambda config: config.pop("format_version"), "version"),
    "a version of truth": (lambda config: config.update(format_version=True), "version"),
    "no linears": (lambda config: config.update(linears=[1]), "linears"),
    "a linear missing": (lambda config: config["linears"].pop(UP), UP),
    "a linear that is none": (lambda config: config["linears"].update(x=config["linears"][UP]), "x"),
    "a name in two lines": (lambda config: config["linears"].update({"x\ny": config["linears"][UP]}), "x\\ny"),
    "a huge shape": (lambda config: config["linears"][UP].update(shape=[2**40, 2**40]), UP),
    "another shape": (lambda config: config["linears"][UP].update(shape=[80, 33]), "33"),
    "a large shape": (lambda config: config["linears"][UP].update(shape=[2**30, 2**30]), str(2**30)),
    "a shape of words": (lambda config: config["linears"][UP].update(shape="ab"), UP),
    "a shape of truths": (lambda config: config["linears"][UP].update(shape=[True, True]), UP),
    "another layout": (lambda config: config["linears"][UP].update(layout="nm", pattern=[2, 4]), UP),
    "an unknown layout": (lambda config: config["linears"][UP].update(layout="csr"), "csr"),
    "a pattern with a bitmask": (lambda config: config["linears"][UP].update(pattern=[2, 4]), UP),
    "a pattern without codes": (lambda config: config["linears"][UP].update(layout="nm", pattern=[3, 4]), "3:4"),
    "an unknown type": (lambda config: config["linears"][UP].update(value_type="int2"), "int2"),
    "another type": (lambda config: config["linears"][UP].update(value_type="int8"), UP),
    "no dtype": (lambda config: config["linears"][UP].update(dtype="save"), "save"),
    "integers for the dense weight": (lambda config: config["linears"][UP].update(dtype="int8"), "dtype is 'int8'"),
    "truths for the dense weight": (lambda config: config["linears"][UP].update(dtype="bool"), "dtype is 'bool'"),
    "eight bits for the dense weight": (lambda config: config["linears"][UP].update(dtype="float8_e5m2"), "float8"),
    "another dtype for the dense weight": (lambda config: config["linears"][UP].update(dtype="float16"), UP),
    "transposed": (lambda config: config["linears"][UP].update(transposed=True), UP),
    "transposed by a word": (lambda config: config["linears"][UP].update(transposed="no"), UP),
    "an unknown field": (lambda config: config["linears"][UP].update({"zero\npoint": 3}), "zero\\npoint"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_refused(case: str, packed: Path, tmp_path: Path) -> None:
    """By structure alone where ``packed.json`` does not cover ``config.json``, and by its checksum where it does."""
    change, said = CONFIGS[case]
    directory = copy_without_config_digest(packed, tmp_path / "p")
    change_config(directory, change)
    refused(directory, said)
    directory = copy(packed, tmp_path / "p")
    change_config(directory, change)
    refused(directory)


def test_config_is_covered_as_far_as_it_describes_packed_weights(packed: Path, llama: Path, tmp_path: Path) -> None:
    """Other tools rewrite other keys, and the order of all."""
    directory = copy(packed, tmp_path / "p")
    config = read_config(directory)
    changed = {**dict(reversed(config.items())), "transformers_version": "9", "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(changed))
    assert PackedReader(directory).entries == PackedReader(packed).entries
    change_config(directory, lambda found: found.update(comment="new"))
    refused(directory, "config.json", "SHA-256")
    out = sparsellm.unpack(copy_without_config_digest(packed, tmp_path / "old"), out=tmp_path / "dense").path
    for name, value in tensors(llama).items():
        assert torch.equal(value, tensors(out)[name]), name


def test_a_square_weight_described_as_transposed_is_refused(tmp_path: Path) -> None:
    source = save_tiny(prune_tiny(tiny_gpt2()), None, tmp_path / "dense")
    directory = copy_without_config_digest(sparsellm.pack(source, out=tmp_path / "packed").path, tmp_path / "p")
    name = next(name for name, entry in PackedReader(directory).entries.items() if entry.shape[0] == entry.shape[1])
    change_config(directory, lambda config: config["linears"][name].pop("transposed"))
    refused(directory, name)


def test_values_that_the_dense_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = prune_tiny(tiny_llama())
    with torch.no_grad():
        model.get_submodule(UP).weight[0, 0] = 1e6
    directory = sparsellm.pack(save_tiny(model, None, tmp_path / "dense"), out=tmp_path / "p").path
    (directory / "packed.json").unlink()
    change_config(directory, lambda config: config["linears"][UP].update(dtype="float16"))
    with pytest.raises(StorageError, match=f"{UP} has 1 values that torch.float16 cannot hold"):
        sparsellm.unpack(directory, out=tmp_path / "u")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "p"]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("_mask", lambda tensor: tensor ^ 1),
        ("_offsets", lambda tensor: tensor * 1000),
        ("_values", lambda tensor: tensor[:-1]),
        ("_mask", None),
        ("_offsets", None),
        ("_values", None),
        ("", None),
        ("", lambda tensor: torch.zeros(80, 32)),
        ("", lambda tensor: tensor.int()),
    ],
)
def test_tensors_that_do_not_fit_are_refused_without_checksums_too(
    field: str, change: Any, packed: Path, tmp_path: Path
) -> None:
    directory = copy(packed, tmp_path / "p")
    change_tensor(directory, f"{UP}.weight{field}", change)
    refused(directory, UP)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_files_are_refused(keep: float, packed: Path, tmp_path: Path) -> None:
    directory = copy(packed, tmp_path / "p")
    (directory / "packed.json").unlink()
    victim = sorted(directory.glob("*.safetensors"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    refused(directory)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_bytes_in_a_file_never_end_in_another_error(data: st.DataObject, packed: Path, tmp_path: Path) -> None:
    directory = copy(packed, tmp_path / "p")
    (directory / "packed.json").unlink()
    victim = sorted(directory.glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    header = int.from_bytes(content[:8], "little")
    inside = data.draw(st.sampled_from([(0, 8), (8, 8 + header), (8 + header, len(content))]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(inside[0], inside[1] - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(content)
    try:
        reader = PackedReader(directory)
        found = reader.read(list(reader))
    except SparseLLMError:
        return
    assert all(value.shape == reader.shape(name) for name, value in found.items())


FIELDS = {
    "shape": st.lists(st.sampled_from([0, 1, 16, 32, 64, 79, 80, 81, True, 32.0]), max_size=3),
    "layout": st.sampled_from(["bitmask", "nm", "BITMASK", ""]),
    "value_type": st.sampled_from(["bf16", "fp16", "fp32", "int8", "int4", "keep", "float32"]),
    "dtype": st.sampled_from(["float32", "float16", "bfloat16", "float64", "int8", "int64", "bool", "half", "uint4"]),
    "pattern": st.sampled_from([[1, 4], [2, 4], [4, 8], [3, 4], [4, 2], [2, 4, 4], "24"]),
    "transposed": st.booleans(),
}
NONSENSE = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_an_entry_writes_wrong_numbers(
    data: st.DataObject, packed: Path, llama: Path, tmp_path: Path
) -> None:
    """Whatever one field of ``config.json`` is changed to, with a ``packed.json`` that does not cover it."""
    directory = copy_without_config_digest(packed, tmp_path / "p")
    name = data.draw(st.sampled_from(sorted(PackedReader(directory).entries)))
    field = data.draw(st.sampled_from(sorted(FIELDS)))
    value = data.draw(FIELDS[field] | NONSENSE)
    change_config(directory, lambda config: config["linears"][name].update({field: value}))
    try:
        out = sparsellm.unpack(directory, out=tmp_path / "u", overwrite=True).path
    except SparseLLMError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert not list(tmp_path.glob("*.partial"))
        return
    key = f"{name}.weight"
    assert torch.equal(tensors(out)[key], tensors(llama)[key])


def _command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """A command's exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["sparsellm", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0), capsys.readouterr().err.strip()


def _damaged_dense(directory: Path, how: str) -> None:
    if how == "config":
        (directory / "config.json").write_bytes(b'{"model_type": "llama", "hidden_size": \xff}')
    elif how == "a shard cut short":
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "a missing weight":
        change_tensor(directory, f"{UP}.weight", None)
    else:  # found in the last block, when the others are written
        change_tensor(directory, "model.layers.2.mlp.up_proj.weight", lambda tensor: tensor / 0)


@pytest.mark.parametrize("how", ["config", "a shard cut short", "a missing weight", "values that are not finite"])
def test_pack_of_a_damaged_directory_is_one_line_and_leaves_nothing(
    how: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copy(llama, tmp_path / "dense")
    _damaged_dense(directory, how)
    command = ("pack", directory, "--out", tmp_path / "out", "--values", "int8")
    code, stderr = _command(monkeypatch, capsys, *command)
    assert (code, stderr.count("\n"), stderr[:7]) == (2, 0, "error: ")
    assert list(tmp_path.iterdir()) == [directory]


def test_unpack_of_a_damaged_directory_is_one_line_and_keeps_what_stood_in_out(
    packed: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damage is in the last block, so that shards have been written when it is met."""
    directory, old = copy(packed, tmp_path / "p"), copy(llama, tmp_path / "out")
    change_tensor(directory, "model.layers.2.mlp.up_proj.weight_mask", lambda tensor: tensor ^ 1)
    code, stderr = _command(monkeypatch, capsys, "unpack", directory, "--out", old, "--overwrite")
    assert (code, stderr.count("\n")) == (2, 0)
    assert "model.layers.2.mlp.up_proj" in stderr
    assert sorted(tmp_path.iterdir()) == [old, directory]
    assert all((old / file.name).read_bytes() == file.read_bytes() for file in llama.iterdir())
