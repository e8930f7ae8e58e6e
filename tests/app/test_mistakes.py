"""Mistakes of new users: each is one line that names what was typed and says what to write, and exit code 2."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

import sparsellm
from sparsellm.errors import StorageError
from sparsellm.files import named, resolve
from sparsellm.files.writer import CheckpointWriter
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.models.pruned import prune_tiny

PRUNE = "prune model --out p"
# What is typed, and the expected phrase; the hub is offline, as for a new user without internet.
MISTAKES = [
    ("prune", "MODEL is missing; give MODEL: Checkpoint directory, hub id"),
    ("prune model", "--out is missing; give --out DIR: Directory of the pruned"),
    ("eval model", "--text is missing; give --text SOURCE"),
    ("generate packed", "PROMPT is missing; give PROMPT: Text to continue"),
    ("prune model --output p", "has no option --output; did you mean --out?"),
    ("prune model -z p", "has no option -z; `sparsellm prune --help` lists all"),
    (f"{PRUNE} --sparsety 0.5", "has no option --sparsety; did you mean --sparsity?"),
    ("prun model", "No such command 'prun'. Did you mean 'prune'?"),
    ("push model", "No such command 'push'; `sparsellm --help` lists all"),
    ("help", "No such command 'help'; `sparsellm --help` lists all"),
    ("inspect model packed", "'packed' is one word too many; `sparsellm inspect --he"),
    ("prune dmo --out p", "no such directory, and the hub is not asked, because"),
    ("prune dmo --out p", "; did you mean 'demo'?"),
    ("prune modl --out p", "model 'modl' not found: there is no such directory"),
    ("prune modl --out p", "; did you mean 'model'?"),
    ("prune ./no/model --out p", "directory; give a checkpoint directory, a hub id"),
    ("prune model.guff --out p", "model 'model.guff' not found"),
    (
        "prune nothing.gguf --out p",
        "nothing.gguf: there is no such file; give the path",
    ),
    ("eval model --text w.txt --against modle", "against 'modle' not found"),
    ("generate paked hello", "; did you mean 'packed'?"),
    ("chat nowhere", "model 'nowhere' not found"),
    ("serve nowhere", "model 'nowhere' not found"),
    ("bench nowhere", "model 'nowhere' not found"),
    ("bench model", "model is not packed; pack it first: sparsellm pack model"),
    ("chat packed", "no chat template, so it takes no conversation; continue a text"),
    (f"{PRUNE} --sparsity 50%", "--sparsity is '50%'; write 0.5"),
    (f"{PRUNE} --sparsity 0,5", "--sparsity is '0,5'; write 0.5, with a point"),
    (f"{PRUNE} --sparsity 50", "did you mean 0.5?"),
    (f"{PRUNE} --sparsity half", "--sparsity is 'half'; write a number, such as 0.5"),
    (f"{PRUNE} --sparsity 0.5 0.7", "'0.7' is one word too many after --sparsity 0.5"),
    (f"{PRUNE} --sparsity 0.5,0.7", "`sparsellm compare` takes several, with commas"),
    ("compare model --out c --sparsity 0.5 0.7", "write --sparsity 0.5,0.7, with"),
    ("compare model --out c --sparsity 50%", "sparsity is '50%'; write 0.5"),
    ("compare model --out c", "needs one method or more, and one sparsity or pattern"),
    (f"{PRUNE} --memory 4", "size '4' means 4 bytes; write a unit, such as 4GiB"),
    (f"{PRUNE} --memory 4 GB", "'GB' is one word too many; write --memory 4GB"),
    (f"{PRUNE} --memory lots", "size 'lots' is unknown; write a positive number"),
    ("serve packed --max-body 4", "size '4' means 4 bytes; write a unit"),
    ("plan model --memory 1B", "it does not fit; allow more with --memory"),
    (f"{PRUNE} --samples 32k", "--samples is '32k'; write 32000"),
    (f"{PRUNE} --samples 1,000", "--samples is '1,000'; write 1000"),
    (f"{PRUNE} --samples 1e3", "--samples is '1e3'; write 1000"),
    (f"{PRUNE} --effort high", "--effort is 'high'; write a whole number"),
    (f"{PRUNE} --effort 5", "effort is 5: it should be less than or equal to 3"),
    (f"{PRUNE} --values INT4", "values is 'INT4': it should be 'keep', 'int8', 'int6'"),
    (f"{PRUNE} --pattern 2-4", "write n:m with whole numbers, such as 2:4"),
    (f"{PRUNE} --pattern 2:4 --sparsity 0.7", "pattern 2:4 means sparsity 0.5, not 0"),
    (f"{PRUNE} --method sparse-gpt", "did you mean 'sparsegpt'?"),
    (f"{PRUNE} --method wanda --effort 1", "wanda has no sweep, so no effort; leave"),
    (f"{PRUNE} --calibration w.text", "unknown text source 'w.text'"),
    (
        f"{PRUNE} --calibration v.txt",
        "text file 'v.txt' does not exist; check the path",
    ),
    (f"{PRUNE} --calibration full", "'full' is a directory; name a file in it (.txt"),
    (f"{PRUNE} --calibration w.pdf", "'w.pdf' is not a kind of file that can be read"),
    (
        f"{PRUNE} --calibration w.txt:-1,v.txt:1",
        "share '-1' of 'w.txt' in 'w.txt:-1,v.txt:1' is not a number above 0; write w.t",
    ),
    (
        f"{PRUNE} --calibration w.txt,v.txt",
        "'w.txt' in 'w.txt,v.txt' has no share of the windows; write w.txt:0.5,v.txt:0.",
    ),
    (f"{PRUNE} --set sparsity", "'sparsity' has no '='; write key=value"),
    (f"{PRUNE} --set sparsty=0.5", "did you mean 'sparsity'?"),
    (f"{PRUNE} --set sparsity=50%", "sparsity is '50%'; write 0.5"),
    (f"{PRUNE} --recipe r.yaml", "cannot read 'r.yaml': there is no such file; check"),
    (f"{PRUNE} --device gpu", "device 'gpu' does not exist here; here: cpu"),
    (f"{PRUNE} --seq-len 100000", "set seq_len to 128 or less"),
    ("prune model --out full", "--out full exists and is not empty; name another"),
    ("prune model --out model", "--out model overlaps with the model"),
    ("report model", "no pruning.json; give a directory that `sparsellm prune` wrote"),
    ("report model packed", "2 runs need a file for the comparison; give --out"),
    (
        "export model --to transformers --out q",
        "model is not packed; there is nothing to unpack",
    ),
    ("export packed --to onnx --out m", "write gguf (for llama.cpp), compressed-tens"),
    ("generate hello packed", "the prompt 'packed' is a model; give the model first"),
    ("exec python -c pass", "write -- before the command that is run"),
    (
        "prune model --out p --size 4GB",
        "has no option --size; it belongs to compress, demo;",
    ),
    (f"{PRUNE} --samples 4 --set samples=8", "samples is given by an option and by"),
    (f"{PRUNE} --seq-len -5 --set seq_len=16", "seq_len is given by an option and by"),
    (f"{PRUNE} --calibration pycode:0.5,pydoc", "'pydoc' in 'pycode:0.5,pydoc' has no"),
    ("serve packed --name ''", "--name is '': it should have at least 1 character"),
    (
        "demo --out packed",
        "--out packed exists and is not empty; name another directory",
    ),
    (
        "compare model --method wanda --sparsity 0.5 --text pydoc --out packed",
        "--out packed is a checkpoint itself; name a directory for new ones",
    ),
    ("serve packed --key-file no.key", "check the path, or leave it out"),
    ("compress model --out s", "give --for and one of llama.cpp, vllm, sparsellm, tra"),
    ("compress model --for ollama --out s", "'llama.cpp', 'vllm', 'sparsellm' or 'tra"),
    (
        "compress model --for vllm --out s",
        "give --size, such as 4GB or auto, or --bits, such",
    ),
    ("compress model --for sparsellm --size 4 GB --out s", "write --size 4GB"),
    (
        "compress model --for sparsellm --size 1KB --out s",
        "size 1.0 kB is too small for",
    ),
    (
        "compress model --for sparsellm --size 40GB --out s",
        "size 40,000.0 MB is too large for sparsellm: at most",
    ),
    (
        "compress model --for sparsellm --bits 15.9 --out s",
        "are possible; give at most that, or keep the model as it is, without rounding",
    ),
    ("compress model --for sparsellm --bits 4bit --out s", "write 4, without a unit"),
    ("compress model --for sparsellm --bits 4,5 --out s", "write 4.5, with a point"),
    ("compress model --values int4 --out s", "--values; it belongs to prune"),
    ("compress modle --for llama.cpp --bits 4 --out s.gguf", "did you mean 'model'?"),
    ("compress model --for llama.cpp --bits 4 --out s.gguf", "it with --converter, su"),
    ("compress model --for transformers --size 1MB --out s", "give a sparsity, or ano"),
    ("prune model --out p --calibration", "--calibration has no value; write one"),
    ("plan model --gpu", "--gpu has no value; write one after it"),
    ("prune https://huggingface.co/a/b --out p", "write the id alone: a/b"),
    (f"{PRUNE} --set only=foo", "only is 'foo'; write a list, such as only=["),
    (f"{PRUNE} --set options=3", "options is 3; write options.NAME=VALUE"),
    (f"{PRUNE} --set exclude=*.k_proj", "write exclude=['*.k_proj']"),
    (f"{PRUNE} --calibration w.txt:0.5", "gives a share to its only text; write w.txt"),
    ("serve packed --host no.such", "this name is unknown (Name or service not known"),
    ("generate packed hello --temperature -1", "temperature is -1.0: it should be"),
    ("serve packed --port 99999", "--port is 99999: it should be less than or equal"),
    (f"{PRUNE} --seq-len 0", "error: --seq-len is 0: it should be greater than or"),
    (f"{PRUNE} --values INT4", "error: --values is 'INT4': it should be 'keep'"),
    (f"{PRUNE} --set seq_len=0", "error: recipe field seq_len is 0: it should be"),
    ("eval model --text w.txt --seq-len 0", "error: --seq-len is 0: it should be gr"),
    ("plan model --ranks 0", "error: --ranks is 0: it should be greater than or"),
    ("compress model --for vllm --bits 0 --out s", "error: --bits is 0.0: it should"),
    ("compress model --for no --bits 4 --out s", "error: --for is 'no': it should be"),
    ("generate packed a --max-new-tokens 0", "error: --max-new-tokens is 0: it sho"),
    ("serve packed --port http", "--port is 'http'; write a whole number"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a dense model, a packed one, a text, a file of another kind and a full directory."""
    place = tmp_path_factory.mktemp("mistakes")
    save_tiny(tiny_llama(), tiny_tokenizer(), place / "model")
    zeros = save_tiny(prune_tiny(tiny_llama()), tiny_tokenizer(), place / "zeros")
    sparsellm.pack(zeros, out=place / "packed")
    for name in ("w.txt", "w.pdf"):
        (place / name).write_text(" ".join(map(str, range(4000))))
    (place / "full").mkdir()
    (place / "full" / "mine").write_text("mine")
    return place


@pytest.mark.parametrize(("typed", "said"), MISTAKES)
def test_a_mistake_says_what_to_do(
    typed: str, said: str, place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    stderr = run(*shlex.split(typed), exits=2)[2]
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert said in errors[0]
    assert "Traceback" not in stderr
    assert "snapshots" not in stderr
    assert sorted(place.rglob("*")) == before


@pytest.fixture
def demo(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The directory of the demo model in the cache, with a tiny model in place of the real one."""
    kept = tmp_path / "cache" / "gguf" / "b179c9"
    shutil.copytree(place / "model", kept)
    monkeypatch.setattr(resolve, "demo_gguf", Path)
    monkeypatch.setattr(resolve, "gguf_checkpoint", lambda *_: kept)
    monkeypatch.chdir(place)
    yield kept
    named._typed.clear()


def test_demo_is_a_model_for_every_command(demo: Path, run: Any) -> None:
    stdout = run("generate", "demo", "The", "--max-new-tokens", 2, exits=0)[1]
    assert stdout.startswith("The")
    assert run("inspect", "demo", "--json", exits=0)[0] == 0
    for command in ("bench", "chat"):
        line = run(command, "demo", exits=2)[2]
        assert {
            "bench": "demo is not packed; pack it first: sparsellm pack demo --out DIR",
            "chat": "the model has no chat template",
        }[command] in line
        assert str(demo) not in line


def test_messages_name_what_was_typed_and_no_path_of_the_cache(
    demo: Path, run: Any
) -> None:
    (weights,) = demo.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    for command in (
        ["prune", "demo", "--out", "p", "--calibration", "w.txt"],
        ["generate", "demo", "The"],
        ["pack", "demo", "--out", "p"],
        ["inspect", "demo"],
    ):
        stderr = run(*command, exits=2)[2]
        assert "demo" in stderr
        assert str(demo.parent) not in stderr


def test_what_is_not_there_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom sparsellm.app import cli\n"
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        assert name != 'torch'\n"
        "sys.meta_path.insert(0, Finder())\nsys.argv = ['sparsellm', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "full" / "mine").mkdir(parents=True)
    for typed, said in (
        ("prune no/such/model --out p", "model 'no/such/model' not found"),
        ("prune model --out p --calibration v.txt", "'v.txt' does not exist"),
        ("prune model --out p --teacher ./t", "teacher './t' not found"),
        ("generate ./packed hello", "model './packed' not found"),
        ("prune model --out full", "--out full exists and is not empty"),
        ("export ./p --to gguf --out m.gguf", "directory './p' not found"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *typed.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RepositoryNotFoundError("404", response=Mock()), "the hub has none of that name"),
        (GatedRepoError("403", response=Mock()), "its owner grants access on the hub"),
        (LocalEntryNotFoundError("no snapshot"), "the hub cannot be reached"),
        (httpx.ConnectError("refused " * 99), "the hub cannot be reached"),
        (httpx.ReadTimeout("late"), "the hub cannot be reached"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)  # fmt: skip
def test_the_reason_of_the_hub_is_a_short_clause(
    error: Exception, said: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    (line,) = run("inspect", "owner/nowhere", exits=2)[2].splitlines()
    assert line.startswith("error: model 'owner/nowhere' not found: there is no such")
    assert said in line
    assert len(line) < 260


def test_an_unfinished_run_of_another_model_names_both(
    place: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    small = ["--samples=2", "--seq-len=16", "--method=magnitude", "--calibration=w.txt"]
    monkeypatch.setattr(CheckpointWriter, "finish", Mock(side_effect=StorageError))
    run("prune", "model", "--out", tmp_path / "p", *small, exits=2)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    said = "holds an unfinished run of 'model', and this one prunes 'zeros'; name another --out, or give --restart"
    for more in ([], ["--dry-run"]):
        line = run("prune", "zeros", "--out", tmp_path / "p", *small, *more, exits=2)[2]
        assert said in line.splitlines()[-1]
    assert run("prune", "model", "--out", tmp_path / "p", *small)[0] == 0


def test_what_looks_like_a_command_does_not_go_to_the_model(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_tiny(tiny_llama(), tokenizer, place / "talks")
    for end in ("/exit", "/bye", "/quit"):
        typed = f"/help\n/halp\n{end}\nnot read\n"
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        _, stdout, stderr = run("chat", "talks", exits=0)
        assert stdout == ""
        help_line, unknown = stderr.splitlines()[-2:]
        assert help_line.startswith("/reset begins anew, /quit or Ctrl-D ends")
        assert unknown == f"/halp is no command here; {help_line}"
    shutil.rmtree(place / "talks")


def test_inspect_has_a_row_for_each_kind_and_what_the_files_hold(
    place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    model = tiny_llama()
    parameters = sum(weight.numel() for weight in model.parameters())
    size = (place / "model" / "model.safetensors").stat().st_size
    told = json.loads(run("inspect", "model", "--json", exits=0)[1])
    assert told["parameters"] == parameters
    assert told["dtypes"] == {"float32": parameters}
    assert (told["architecture"], told["file_bytes"]) == ("LlamaForCausalLM", size)
    short = run("inspect", "model", columns=80, exits=0)[1]
    long = run("inspect", "model", "--all", columns=80, exits=0)[1]
    assert f"LlamaForCausalLM: {parameters / 1000:.1f}K parameters (float32)" in short
    assert short.count("mlp.down_proj") == 1
    assert long.count("mlp.down_proj") == model.config.num_hidden_layers
    assert "block 0" in long
    assert len(short.splitlines()) < 20
