"""Packed checkpoints that were damaged: every door refuses them, and no wrong number is written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsellm
import sparsepack
from sparsellm.errors import SparseLLMError, StorageError
from sparsellm.files.reader import CheckpointReader, PackedReader
from sparsepack import PackError
from sparsepack.checkpoint import manifest
from sparsepack.errors import FormatError
from sparsepack.files import read_object
from sparsepack.layout import unpack
from tests.files.small import tensors_of
from tests.killing import ahead_of
from tests.method.sweep.helpers import same_bits
from tests.models import save_tiny, tiny_gpt2, tiny_llama
from tests.models.pruned import prune_tiny

UP = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed model whose files may be changed."""
    return Path(shutil.copytree(packed, tmp_path / "p"))


def restore(directory: Path, original: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(original, directory)


def forget_config_digest(directory: Path) -> Path:
    """``packed.json`` does not cover ``config.json``, as it was at first."""
    listed = json.loads((directory / "packed.json").read_text())
    del listed["quantization_config_sha256"]
    (directory / "packed.json").write_text(json.dumps(listed))
    return directory


def change_config(directory: Path, change: Change) -> None:
    config = read_object(directory / "config.json")
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def change_tensor(
    directory: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    """Changes one tensor, or removes it where ``change`` is None, and removes ``packed.json``."""
    (directory / "packed.json").unlink(missing_ok=True)
    file = CheckpointReader(directory).file_of(name)
    held = load_file(file)
    tensor = held.pop(name)
    if change is not None:
        held[name] = change(tensor)
    save_file(held, file, {"format": "pt"})  # type: ignore[no-untyped-call]


def refused(directory: Path, *said: str) -> None:
    """By every door, with one line; ``unpack`` leaves nothing behind."""
    out, before = directory.parent / "unpacked", sorted(directory.parent.iterdir())
    doors = (
        AutoModelForCausalLM.from_pretrained,
        lambda path: sparsellm.unpack(path, out=out),
    )
    for open_it, error in zip(doors, (PackError, SparseLLMError), strict=True):
        with pytest.raises(error) as raised:
            open_it(directory)
        assert all(part in str(raised.value) for part in said), str(raised.value)
    assert sorted(directory.parent.iterdir()) == before


def test_a_changed_or_missing_file_is_found_by_its_checksum(
    packed: Path, copy: Path
) -> None:
    victim = sorted(copy.glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    refused(copy, victim.name)
    restore(copy, packed)
    listed = json.loads((copy / "packed.json").read_text())
    assert listed == manifest(copy)
    name, digest = next(iter(listed["sha256"].items()))
    for wrong, said in (
        ({**listed, "sha256": {"../x": digest}}, "checksums"),
        ({**listed, "sha256": {name: "0"}}, "checksums"),
        (
            {**listed, "sha256": {**listed["sha256"], "x.safetensors": digest}},
            "x.safetensors",
        ),
        ({**listed, "sha256": {"x" * 300: digest}}, "xxx"),
        ({**listed, "sha256": {"x\n": digest}}, "x\\n"),
        ({**listed, "sha256": {name: digest}}, "does not list"),
        ({**listed, "format_version": 99}, "format version 99"),
        ([], "object"),
    ):
        (copy / "packed.json").write_text(json.dumps(wrong))
        refused(copy, said)
    (copy / "packed.json").write_text("{")
    refused(copy, "packed.json", "JSON")


def entry(**changes: Any) -> Change:
    return lambda config: config["linears"][UP].update(changes)


CONFIGS: list[tuple[Change, str]] = [
    (lambda config: config.update(format_version=99), "99"),
    (lambda config: config.pop("format_version"), "version"),
    (lambda config: config["linears"].pop(UP), UP),
    (lambda config: config["linears"].update(x=config["linears"][UP]), "x"),
    (entry(shape=[80, 33]), "33"),
    (entry(layout="csr"), "csr"),
    (entry(layout="nm", pattern=[3, 4]), "3:4"),
    (entry(dtype="int8"), "dtype is 'int8'"),
    (entry(transposed=True), UP),
    (entry(**{"zero\npoint": 3}), "zero\\npoint"),
]


@pytest.mark.parametrize(("change", "said"), CONFIGS)
def test_a_config_that_does_not_fit_is_refused(
    change: Change, said: str, copy: Path
) -> None:
    """By structure alone where ``packed.json`` does not cover ``config.json``, and by its checksum where it does."""
    listed = (copy / "packed.json").read_text()
    change_config(forget_config_digest(copy), change)
    refused(copy, said)
    (copy / "packed.json").write_text(listed)
    with pytest.raises(SparseLLMError):
        PackedReader(copy)


def test_shards_elsewhere_and_adapters_are_not_loaded(
    llama: Path, tmp_path: Path
) -> None:
    """transformers follows an index out of the directory, and applies an adapter that `prune` and `eval` do not see."""
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    names = load_file(
        (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    )
    index = {"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="which is not in"):
        sparsepack.load(copy)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="merge the adapter first"):
        sparsepack.load(copy)


def test_other_keys_of_the_config_have_no_checksum(
    packed: Path, llama: Path, copy: Path, tmp_path: Path
) -> None:
    """Other tools rewrite them, and the order of all."""
    config = read_object(copy / "config.json")
    changed = {
        **dict(reversed(config.items())),
        "transformers_version": "9",
        "dtype": "bfloat16",
    }
    (copy / "config.json").write_text(json.dumps(changed))
    assert PackedReader(copy).entries == PackedReader(packed).entries
    change_config(copy, lambda content: content.update(comment="new"))
    refused(copy, "config.json", "SHA-256")
    out = sparsellm.unpack(forget_config_digest(copy), out=tmp_path / "dense").path
    assert same_bits(tensors_of(llama), tensors_of(out))


def test_a_square_weight_described_as_transposed_is_refused(tmp_path: Path) -> None:
    source = save_tiny(prune_tiny(tiny_gpt2()), None, tmp_path / "dense")
    directory = forget_config_digest(
        sparsellm.pack(source, out=tmp_path / "packed").path
    )
    name = next(
        name
        for name, entry in PackedReader(directory).entries.items()
        if entry.shape[0] == entry.shape[1]
    )
    change_config(directory, lambda config: config["linears"][name].pop("transposed"))
    refused(directory, name)


def test_values_that_the_dense_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = prune_tiny(tiny_llama())
    model.get_submodule(UP).weight.data[0, 0] = 1e6
    directory = sparsellm.pack(
        save_tiny(model, None, tmp_path / "dense"), out=tmp_path / "p"
    ).path
    (directory / "packed.json").unlink()
    change_config(directory, entry(dtype="float16"))
    with pytest.raises(
        StorageError, match=f"{UP} has 1 values that torch.float16 cannot hold"
    ):
        sparsellm.unpack(directory, out=tmp_path / "u")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "p"]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("_mask", lambda tensor: tensor ^ 1),
        ("_values", None),
        ("", None),
        ("", lambda tensor: torch.zeros(80, 32)),
    ],
)
def test_tensors_that_do_not_fit_are_refused_without_checksums(
    field: str, change: Any, copy: Path
) -> None:
    change_tensor(copy, f"{UP}.weight{field}", change)
    refused(copy, UP)


def test_a_shape_beyond_the_file_takes_no_memory(tmp_path: Path) -> None:
    """The row offsets of a weight without zeros are computed, 16 GiB for this shape."""
    dense = save_tiny(tiny_llama(), None, tmp_path / "dense")
    out = forget_config_digest(
        sparsellm.pack(dense, out=tmp_path / "packed", values="int8").path
    )
    change_config(out, entry(shape=[2**31 - 1, 32]))
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + (4 << 30), before[1]))
    try:
        with pytest.raises(
            StorageError, match=rf"{UP}: values is .*, too few for \(2147483647, 32\)"
        ):
            sparsellm.unpack(out, out=tmp_path / "u")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "offsets",
    [torch.zeros(2, 3, dtype=torch.int64), torch.tensor(5), torch.ones(3)],
    ids=str,
)
def test_damaged_offsets_of_int3_are_refused(
    offsets: torch.Tensor, llama: Path, tmp_path: Path
) -> None:
    """The number of values in them is needed before the values can be read."""
    out = sparsellm.pack(llama, out=tmp_path / "packed", values="int3").path
    name = next(
        name
        for name, entry in PackedReader(out).entries.items()
        if entry.layout == "bitmask"
    )
    change_tensor(out, f"{name}.weight_offsets", lambda _: offsets)
    refused(out, "offsets is torch")


@pytest.fixture(scope="module")
def int6(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparsellm.pack(
        llama,
        out=tmp_path_factory.mktemp("int6") / "packed",
        values="int6",
        head="keep",
    ).path


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("values", lambda values: values[:-1], "values of 6 bits"),
        ("values", lambda values: values.char(), "values of 6 bits"),
        ("scales", lambda scales: scales.float(), "scales is torch.float32"),
        ("scales", lambda scales: scales[:, 0].float(), "groups of columns"),
        ("scales", None, "no scales"),
        ("offsets", lambda offsets: offsets * 2, "values of 6 bits"),
    ],
)
def test_damaged_tensors_of_int6_are_refused(
    field: str, change: Any, said: str, int6: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(int6, tmp_path / "packed")
    name = next(
        name
        for name, entry in PackedReader(out).entries.items()
        if entry.layout == "bitmask"
    )
    change_tensor(out, f"{name}.weight_{field}", change)
    refused(out, name, said)


def test_int6_is_not_read_as_int5(int6: Path, tmp_path: Path) -> None:
    out = shutil.copytree(int6, tmp_path / "packed")
    (out / "packed.json").unlink()
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"int6"', '"int5"'))
    refused(out, "values of 5 bits")


def test_int6_is_saved_as_int8_with_scales_of_groups(
    int6: Path, tmp_path: Path
) -> None:
    loaded = sparsellm.load(int6)
    loaded.save_pretrained(tmp_path / "saved")
    again = sparsellm.load(tmp_path / "saved")
    entries = PackedReader(tmp_path / "saved").entries
    assert {entry.value_type for entry in entries.values()} == {"int8"}
    for name in entries:
        before = loaded.get_submodule(name).packed
        after = again.get_submodule(name).packed
        assert before.group == after.group is not None
        assert torch.equal(unpack(before), unpack(after))


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(
        path: Path, *_: Any, **__: Any
    ) -> None:  # as for a user without rights; root reads all
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))

    ahead_of(monkeypatch, Path, "open", refusing)
    refused(copy, "cannot read", ".safetensors: Permission denied")
    with pytest.raises(
        FormatError, match=r"cannot read .*\.safetensors: Permission denied"
    ):
        sparsepack.load(copy)
