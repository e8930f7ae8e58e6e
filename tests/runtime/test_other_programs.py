"""Packed models in programs of others: what plain transformers says, `sparsellm exec`, PEFT, the number of weights."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoModelForCausalLM

import sparsellm
from sparsepack.checkpoint import WAY_IN
from tests.models import save_tiny, tiny_gpt2, tiny_llama
from tests.models.pruned import prune_tiny

PIPELINE = """
import sys
from transformers import pipeline
print(type(pipeline("text-generation", sys.argv[1]).model.model.layers[0].mlp.up_proj).__name__)
"""
CHILD = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {PIPELINE!r}, sys.argv[1]]))"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that knows nothing of this one's imports."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(
        words, env={**clean, **environment}, capture_output=True, text=True, check=False
    )


def execute(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "sparsellm", "exec", "--", *command, **environment)


def test_plain_transformers_stops_and_says_the_way_in(packed: Path) -> None:
    done = run(sys.executable, "-c", PIPELINE, packed)
    assert done.returncode == 1
    assert WAY_IN["transformers_weights"] in done.stderr
    for part in ("import sparsepack before you load it", "sparsellm exec -- COMMAND"):
        assert part in WAY_IN["transformers_weights"]


@pytest.mark.parametrize("program", [PIPELINE, CHILD], ids=["itself", "its child"])
def test_exec_runs_python_with_the_format_registered(
    program: str, packed: Path
) -> None:
    done = execute("python", "-c", program, packed)
    assert (done.returncode, done.stdout) == (0, "PackedLinear\n"), done.stderr


def test_exec_keeps_the_users_own_environment(tmp_path: Path) -> None:
    """Its sitecustomize runs too, its variables reach the command, and none of ours is added but the two paths."""
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins\nbuiltins.theirs = 'ran'\n"
    )
    ask = "import json, os, sys; print(json.dumps([theirs, 'sparsepack' in sys.modules, sorted(os.environ), sys.argv]))"
    done = execute(
        "python", "-c", ask, "--out", "a b", PYTHONPATH=str(tmp_path), MINE="1"
    )
    theirs, registered, names, arguments = json.loads(done.stdout)
    assert (theirs, registered, arguments) == ("ran", True, ["-c", "--out", "a b"])
    assert {"MINE", "PATH", "PYTHONPATH"} <= set(names)
    assert not {"TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"} & set(
        names
    ) - set(os.environ)


def test_exec_passes_the_exit_code_on(tmp_path: Path) -> None:
    done = execute("python", "-c", "raise SystemExit(7)", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 7
    assert "torch" not in done.stderr  # it would take seconds
    # Python ignores SIGPIPE, and other programs do not
    ended = execute("sh", "-c", "kill -PIPE $$; echo alive")
    assert (ended.returncode, ended.stdout) == (-signal.SIGPIPE, "")
    (tmp_path / "empty").write_text("\0")
    (tmp_path / "empty").chmod(0o755)
    for name, said in (
        ("no-such-command", "'no-such-command' is not a command on PATH"),
        (tmp_path / "empty", "run:"),
    ):
        done = execute(name, "--flag")
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (
            2,
            "",
            1,
        )
        assert said in done.stderr


def test_peft_names_the_way_out(packed: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match=r"PackedLinear\(.*not trained \(sparsellm unpack\)"
    ):
        peft.get_peft_model(
            sparsellm.load(packed),
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
        )


@pytest.mark.parametrize("head", ["keep", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_number_of_parameters_is_the_dense_models(
    tied: bool, head: str, tmp_path: Path
) -> None:
    changes = {"tie_word_embeddings": tied, "attention_bias": True}
    dense = prune_tiny(tiny_llama(**changes))
    source = save_tiny(dense, None, tmp_path / "dense")
    packed = sparsellm.load(
        sparsellm.pack(source, out=tmp_path / "packed", head=head).path
    )  # type: ignore[arg-type]
    for model in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        for exclude in (False, True):
            assert model.num_parameters(
                exclude_embeddings=exclude
            ) == dense.num_parameters(exclude_embeddings=exclude)
        assert model.num_parameters(only_trainable=True) <= dense.num_parameters()
    other = save_tiny(prune_tiny(tiny_llama(1, **changes)), None, tmp_path / "other")
    loaded = sparsellm.load(
        sparsellm.pack(other, out=tmp_path / "packed-other", head=head).path
    )  # type: ignore[arg-type]
    loaded._apply(lambda tensor: tensor.clone())  # as a move to another device
    loaded.load_state_dict(packed.state_dict())
    assert loaded(**packed.dummy_inputs).logits.equal(
        packed(**packed.dummy_inputs).logits
    )
    name = "model.layers.0.mlp.up_proj"  # by these sizes, device_map divides a model among GPUs
    size = packed.hf_quantizer.param_element_size(packed, f"{name}.weight", None)
    assert size == packed.get_submodule(name).packed.nbytes
    packed.dequantize()
    assert packed.num_parameters() == dense.num_parameters()


def test_what_is_saved_again_loads_again(packed: Path, tmp_path: Path) -> None:
    """A packed model after save_pretrained, one that was made dense, and a checkpoint without the text."""
    model: Any = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "again")
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "again").num_parameters()
        == model.num_parameters()
    )
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    written = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"transformers_weights", "quantization_config"} & written.keys()
    older = Path(shutil.copytree(packed, tmp_path / "older"))
    config = json.loads((older / "config.json").read_text())
    assert config.pop("transformers_weights") == WAY_IN["transformers_weights"]
    (older / "config.json").write_text(json.dumps(config))
    assert sparsellm.load(older).num_parameters() == model.num_parameters()
    dense = sparsellm.unpack(packed, out=tmp_path / "unpacked").path
    assert "transformers_weights" not in json.loads((dense / "config.json").read_text())


def test_names_are_those_of_the_model_that_is_saved_again(tmp_path: Path) -> None:
    """Also where the checkpoint that was packed has no prefix, or the model is the one without a head."""
    model = prune_tiny(tiny_gpt2())
    for source in (model, model.base_model):
        packed = sparsellm.pack(
            save_tiny(source, None, tmp_path / "dense"),
            out=tmp_path / "packed",
            overwrite=True,
        )
        for kind, output in (
            (AutoModelForCausalLM, "logits"),
            (AutoModel, "last_hidden_state"),
        ):
            loaded: Any = kind.from_pretrained(packed.path)
            loaded.save_pretrained(tmp_path / "again")
            again = kind.from_pretrained(tmp_path / "again")
            assert again(**model.dummy_inputs)[output].equal(
                loaded(**model.dummy_inputs)[output]
            )
        assert (
            sparsellm.load(tmp_path / "again")(**model.dummy_inputs).logits.shape[-1]
            == model.config.vocab_size
        )
