"""Evaluation of checkpoints against a plain computation with transformers."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe, api
from sparsellm.errors import ModelError, NumericalError, RecipeError, SparseLLMError
from sparsellm.evaluation import perplexity
from sparsellm.evaluation.tasks import _metrics
from sparsellm.files.results import read_results
from sparsellm.run.fingerprint import tokens_fingerprint
from sparsepack.errors import Note
from tests.killing import full_disk
from tests.models import save_tiny, tiny_llama, tiny_opt, tiny_tokenizer, windows
from tests.models.pruned import prune_tiny
from tests.models.unusual import GEMMA3N, built


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer adds BOS by itself."""
    return save_tiny(
        tiny_llama(), tiny_tokenizer(add_bos=True), tmp_path_factory.mktemp("llama")
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(f"{number} {number * 7919}" for number in range(60)))
    return path


def losses_by_hand(windows: torch.Tensor, model: Any) -> torch.Tensor:
    """The losses of the tokens after the first of each window, ``(windows, T - 1)``, in fp64."""
    with torch.no_grad():
        log_p = model(input_ids=windows).logits.double().log_softmax(-1)
    return -log_p[:, :-1].gather(-1, windows[:, 1:, None]).squeeze(-1)


def by_hand(text: Path, bos: bool, window: int = 16) -> torch.Tensor:
    """The windows of a text, ``(windows, window)``."""
    ids = tiny_tokenizer()(text.read_text())["input_ids"]
    if not bos:
        ids = [0, *ids]  # as the tokenizer's defaults have it, at the start of the text
        return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
    rows = torch.tensor(ids[: len(ids) // (window - 1) * (window - 1)]).view(
        -1, window - 1
    )
    return torch.cat([torch.zeros(len(rows), 1, dtype=torch.int64), rows], dim=1)


@pytest.mark.parametrize(("bos", "led"), [("auto", True), ("yes", True), ("no", False)])
def test_bos_begins_every_window_and_is_not_scored(
    llama: Path, text: Path, bos: Any, led: bool
) -> None:
    windows = by_hand(text, led)
    measured = sparsellm.evaluate(llama, text, seq_len=16, bos=bos)
    assert measured.tokens == windows.shape[0] * 15
    assert measured.value == pytest.approx(
        math.exp(losses_by_hand(windows, tiny_llama()).mean()), rel=1e-5
    )


def test_a_tokenizer_without_bos_is_refused_before_the_work(
    tmp_path: Path, text: Path, refusal: Any
) -> None:
    tokenizer = type(tiny_tokenizer())(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, pad_token="</s>"
    )
    model = save_tiny(tiny_llama(), tokenizer, tmp_path / "model")
    out = tmp_path / "out"
    for arguments in (
        ("eval", model, "--text", text, "--bos", "yes"),
        ("prune", model, "--calibration", text, "--out", out, "--set", "bos=yes"),
    ):
        said = refusal(*arguments, "--seq-len", 16)
        assert "no beginning-of-text token; give bos 'auto' or 'no'" in said
    assert not out.exists()


def test_divergence_is_that_of_both_whole_models(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    other = save_tiny(
        tiny_llama(seed=1, num_hidden_layers=2),
        tiny_tokenizer(add_bos=True),
        tmp_path / "other",
    )
    windows = by_hand(text, bos=True)
    with torch.no_grad():
        dense, model = (
            network(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
            for network in (tiny_llama(), tiny_llama(seed=1, num_hidden_layers=2))
        )
    kl = (dense.exp() * (dense - model)).sum(-1)  # (windows, 15)
    trained = tiny_llama().train()
    trained.lm_head.eval()
    measured = sparsellm.evaluate(other, text, seq_len=16, against=llama).against
    sparsellm.evaluate(trained, windows)
    with pytest.raises(SparseLLMError):
        sparsellm.evaluate(trained, text)
    assert [
        name for name, module in trained.named_modules() if not module.training
    ] == ["lm_head"]
    assert measured is not None
    assert measured.model == llama.name
    assert measured.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    spread = 1.959964 * kl.mean(1).std().item() / math.sqrt(len(windows))
    assert measured.kl_low == pytest.approx(kl.mean().item() - spread, rel=1e-4)
    assert measured.kl_high == pytest.approx(kl.mean().item() + spread, rel=1e-4)
    assert measured.agreement == pytest.approx(
        (dense.argmax(-1) == model.argmax(-1)).double().mean().item()
    )
    losses = [
        losses_by_hand(
            windows, tiny_llama(seed=seed, num_hidden_layers=3 - seed)
        ).mean()
        for seed in (0, 1)
    ]
    assert measured.perplexity.value == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert measured.recovery == pytest.approx(math.exp(losses[0] - losses[1]), rel=1e-4)


def test_only_a_dense_model_gives_a_recovery(
    llama: Path, text: Path, pruned: Path, tmp_path: Path, run: Any
) -> None:
    recipe = Recipe(
        method="magnitude", sparsity=0.7, calibration=str(text), samples=3, seq_len=16
    )
    worse = sparsellm.prune(llama, recipe, out=tmp_path / "worse").path
    words = ("eval", pruned, "--text", text, "--seq-len", 16, "--against")
    stdout = run(*words, worse, exits=0)[1]
    assert "worse is pruned too, so no recovery is given; its perplexity is" in stdout
    assert "\nrecovery" not in stdout
    (only,) = read_results(pruned).evaluations
    assert only.against is not None
    assert only.against.recovery is None
    assert "\nrecovery" in run(*words, llama)[1]
    half = sparsellm.prune(
        llama, {**vars(recipe), "exclude": ["*.layers.0.*"]}, out=tmp_path / "half"
    ).path
    measured = sparsellm.evaluate(pruned, text, seq_len=16, against=half).against
    assert measured is not None
    assert measured.recovery is None, (
        "no block but the first tells whether it is pruned, and the first is not"
    )


def test_parts_of_text_change_nothing(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_tiny(
        tiny_llama(seed=1), tiny_tokenizer(add_bos=True), tmp_path / "other"
    )
    at_once = sparsellm.evaluate(other, text, seq_len=16, against=llama)
    # three windows of both models
    monkeypatch.setattr(perplexity, "_HIDDEN_BYTES", 2 * 3 * 16 * 32 * 4)
    monkeypatch.setattr(perplexity, "CHUNK", 4)
    monkeypatch.setattr(perplexity, "_BATCH_TOKENS", 32)
    parts = sparsellm.evaluate(other, text, seq_len=16, against=llama)
    assert parts.value == pytest.approx(at_once.value, rel=1e-5)
    assert parts.against is not None
    assert at_once.against is not None
    assert parts.against.kl == pytest.approx(at_once.against.kl, rel=1e-4)
    assert parts.against.agreement == at_once.against.agreement


def test_the_interval_is_that_of_the_windows_mean_losses(
    llama: Path, text: Path
) -> None:
    losses = losses_by_hand(by_hand(text, bos=True), tiny_llama()).mean(1)  # (windows,)
    half = 1.959964 * losses.std().item() / math.sqrt(len(losses))
    measured = sparsellm.evaluate(llama, text, seq_len=16).perplexity
    assert measured.low == pytest.approx(
        math.exp(losses.mean().item() - half), rel=1e-5
    )
    assert measured.high == pytest.approx(
        math.exp(losses.mean().item() + half), rel=1e-5
    )
    alone = sparsellm.evaluate(llama, text, seq_len=16, max_tokens=16).perplexity
    assert (alone.low, alone.high) == (None, None)


def test_models_of_different_tokenizers_are_not_compared(
    llama: Path, text: Path, tmp_path: Path, refusal: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer(add_bos=True))
    tokenizer.add_tokens(["number"])
    others = {
        "larger": (tiny_llama(vocab_size=301), tokenizer),
        "without_bos": (tiny_llama(), tiny_tokenizer()),
    }
    for name, (model, its_tokenizer) in others.items():
        other = save_tiny(model, its_tokenizer, tmp_path / name)
        said = refusal(
            "eval", llama, "--text", text, "--seq-len", 16, "--against", other
        )
        assert "have different tokenizers" in said
        assert str(other) in said


@pytest.fixture
def pruned(llama: Path, text: Path, tmp_path: Path) -> Path:
    recipe = Recipe(
        method="magnitude", sparsity=0.5, calibration=str(text), samples=3, seq_len=16
    )
    return sparsellm.prune(llama, recipe, out=tmp_path / "pruned").path


def test_results_are_appended_next_to_our_checkpoints_only(
    llama: Path, pruned: Path, text: Path, run: Any
) -> None:
    assert json.loads((pruned / "pruning.json").read_text())["calibration_bos"] == "yes"
    arguments = ("eval", pruned, "--text", text, "--seq-len", 16)
    stdout = run(*arguments, exits=0)[1]
    assert f"results in {pruned / 'results.json'}" in stdout
    assert "cut anywhere" not in stdout
    assert "each begins with BOS" in stdout
    shown = json.loads(
        run(*arguments, "--against", llama, "--bos", "no", "--json", exits=0)[1]
    )
    first, second = read_results(pruned).evaluations
    windows = by_hand(text, bos=False)
    settings = {
        "text": text.name,
        "digest": tokens_fingerprint(windows),
        "bos": "no",
        "dtype": "float32",
    }
    sizes = {"window": 16, "windows": len(windows), "tokens": len(windows) * 15}
    assert second.protocol.model_dump() == settings | sizes
    assert (first.protocol.bos, first.against, first.tasks) == ("yes", None, None)
    assert second.against is not None
    assert second.against.model == llama.name
    assert shown["against"] == second.against.model_dump()
    assert shown["perplexity"] == second.perplexity.model_dump()
    assert shown["results"] == str(pruned / "results.json")
    assert run(*arguments, "--no-save")[0] == 0
    assert len(read_results(pruned).evaluations) == 2
    code, stdout, _ = run("eval", llama, "--text", text, "--seq-len", 16)
    assert (code, "results" in stdout, (llama / "results.json").exists()) == (
        0,
        False,
        False,
    )


def test_results_that_are_not_ours_are_not_overwritten(
    pruned: Path, text: Path, run: Any
) -> None:
    place = pruned / "results.json"
    place.write_text('{"format": 2}')
    assert "format is 2" in run("eval", pruned, "--text", text, "--seq-len", 16)[2]
    assert place.read_text() == '{"format": 2}'
    place.unlink()
    place.mkdir()
    assert (
        "not an ordinary file"
        in run("eval", pruned, "--text", text, "--seq-len", 16)[2]
    )


def test_demo_is_no_directory_named_demo(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "pruning.json").write_text("{}")
    (tmp_path / "demo" / "results.json").write_text("not to be read")
    monkeypatch.chdir(tmp_path)
    fetch = Mock(side_effect=ModelError("fetching it"))
    monkeypatch.setattr(api, "checkpoint_directory", fetch)
    assert run("eval", "demo", "--text", text, exits=2)[2] == "error: fetching it\n"
    assert fetch.call_args.args[0] == "demo"


def test_results_go_with_the_checkpoint_that_is_replaced(
    pruned: Path, text: Path, tmp_path: Path, run: Any
) -> None:
    assert run("eval", pruned, "--text", text, "--seq-len", 16)[0] == 0
    sparsellm.pack(pruned, out=tmp_path / "packed")
    assert not (tmp_path / "packed" / "results.json").exists()
    recipe = Recipe(
        method="magnitude", sparsity=0.6, calibration=str(text), samples=3, seq_len=16
    )
    sparsellm.prune(pruned, recipe, out=tmp_path / "again")
    assert not (tmp_path / "again" / "results.json").exists()
    assert "Not evaluated yet" in (tmp_path / "again" / "README.md").read_text()
    sparsellm.prune(tmp_path / "again", recipe, out=pruned, overwrite=True)
    assert not (pruned / "results.json").exists()


def test_a_measurement_that_cannot_be_kept_is_printed(
    pruned: Path, text: Path, run: Any, monkeypatch: Any
) -> None:
    line, measured = (
        ("eval", pruned, "--text", text, "--seq-len", 16, "--json"),
        api.measured,
    )

    def replacing(*given: Any) -> Any:
        result = measured(*given)
        other = sparsellm.pack(pruned, out=pruned.with_name("other")).path
        shutil.rmtree(pruned)
        other.rename(pruned)
        return result

    with full_disk(1):
        _, stdout, stderr = run(*line, exits=0)
    monkeypatch.setattr(api, "measured", replacing)
    for said, (printed, noted) in {
        "is full": (stdout, stderr),
        "was replaced": run(*line, exits=0)[1:],
    }.items():
        assert (json.loads(printed)["results"], read_results(pruned).evaluations) == (
            None,
            [],
        )
        assert re.search(
            f"note: the measurement is not kept in the checkpoint: .*{said}", noted
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one task of two answers in YAML, and its questions in JSON lines."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{n} {n * 7919}", "choices": [" 3", " 8"], "answer": n % 2}
        for n in range(6)
    ]
    (folder / "numbers.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    task = {
        "task": "tiny_numbers", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "numbers.jsonl")}}, "metric_list": [{"metric": "acc"}],
        "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": "",
    }  # fmt: skip
    (folder / "numbers.yaml").write_text(json.dumps(task))
    return folder


def accuracy_by_hand(folder: Path, model: PreTrainedModel, bos: bool) -> float:
    """The share of questions for which the right answer is the likelier continuation."""
    tokenizer, right = tiny_tokenizer(), 0
    for line in (folder / "numbers.jsonl").read_text().splitlines():
        row = json.loads(line)
        start = [0] * bos + tokenizer(row["question"])["input_ids"]
        likelihoods = []
        for choice in row["choices"]:
            ids = torch.tensor(
                [[0] * bos + tokenizer(row["question"] + choice)["input_ids"]]
            )
            likelihoods.append(
                -losses_by_hand(ids, model)[0, len(start) - 1 :].sum().item()
            )
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    return right / 6


def test_local_tasks_run_without_a_hub_packed_or_not(
    llama: Path,
    text: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pruned = prune_tiny(tiny_llama())
    sparsellm.pack(
        save_tiny(pruned, tiny_tokenizer(), tmp_path / "p"), out=tmp_path / "packed"
    )
    # as tokenizers do
    for model, dense, bos in (
        (llama, tiny_llama(), True),
        (tmp_path / "packed", pruned, False),
    ):
        expected, otherwise = (
            accuracy_by_hand(folder, dense, bos=with_bos) for with_bos in (bos, not bos)
        )
        assert expected != otherwise
        state = random.getstate()
        measured = sparsellm.evaluate(
            model, text, seq_len=16, tasks=["tiny_numbers"], tasks_dir=folder
        )
        assert random.getstate() == state  # lm-eval sets it
        assert measured.tasks is not None
        metric = measured.tasks["tiny_numbers"]["acc"]
        assert metric.value == pytest.approx(expected)
        assert metric.stderr is not None
    plain = sparsellm.evaluate(
        llama, text, seq_len=16, bos="no", tasks=["tiny_numbers"], tasks_dir=folder
    )
    assert plain.tasks is not None
    assert plain.tasks["tiny_numbers"]["acc"].value == pytest.approx(
        accuracy_by_hand(folder, tiny_llama(), bos=False)
    )


def test_tasks_change_no_model_and_compute_as_the_blocks(
    text: Path, folder: Path, tmp_path: Path
) -> None:
    model, asked = tiny_opt(), {"seq_len": 16, "tokenizer": tiny_tokenizer()}
    # the config still says that it is tied
    model.lm_head = torch.nn.Linear(48, model.config.vocab_size, bias=False)
    head, plain = model.lm_head.weight, sparsellm.evaluate(model, text, **asked)
    measured = sparsellm.evaluate(
        model, text, tasks=["tiny_numbers"], tasks_dir=folder, **asked
    )
    assert (measured.value, model.lm_head.weight) == (plain.value, head)
    half = api.Opened(
        save_tiny(tiny_llama().half(), tiny_tokenizer(), tmp_path / "half"),
        Recipe(),
        trust=False,
    )
    assert half.in_memory().dtype == half.chain.dtype == torch.float32
    with pytest.warns(Note, match="task numbers: mcc is nan, and is left out"):
        assert [
            *_metrics(
                "numbers",
                {"acc,none": 0.5, "acc_stderr,none": math.nan, "mcc,none": math.nan},
            )
        ] == ["acc"]
    with pytest.raises(
        NumericalError, match="task numbers: perplexity is inf, and no metric is finite"
    ):
        _metrics("numbers", {"perplexity,none": math.inf})


@pytest.mark.parametrize("with_text", [True, False])
def test_an_unknown_task_is_refused_before_the_model_is_opened(
    with_text: bool,
    text: Path,
    folder: Path,
    refusal: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")  # it takes long to read its own tasks
    monkeypatch.setattr(
        tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False)
    )
    line = refusal(
        "eval",
        "nowhere/model",
        *(["--text", text] if with_text else []),
        "--tasks",
        "tiny_nombers",
        "--tasks-dir",
        folder,
    )
    assert "unknown task 'tiny_nombers'; did you mean 'tiny_numbers'?" in line


def test_tasks_without_lm_eval_say_what_to_install(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(RecipeError, match="pip install lm_eval"):
        sparsellm.evaluate(llama, text, tasks=["hellaswag"])
    with pytest.raises(RecipeError, match="without tasks"):
        sparsellm.evaluate(llama, text, tasks_dir="/nowhere")


@pytest.mark.parametrize("name", ["xlnet", "gemma3n_text"])
def test_states_that_are_not_by_window_are_told_from_those_that_are(name: str) -> None:
    """XLNet's have tokens first, and Gemma 3n has four for each token; here a batch has as many windows as tokens."""
    xlnet = {"vocab_size": 300, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    model, ids = (
        built(name, **(xlnet if name == "xlnet" else GEMMA3N)).eval(),
        windows(16, 16),
    )
    assert sparsellm.evaluate(model, ids).value == pytest.approx(
        math.exp(losses_by_hand(ids, model).mean()), rel=1e-4
    )


def test_hooks_of_the_caller_count_once_at_both_ends() -> None:
    model, ids = tiny_llama(), windows(4, 16)
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: (args[0] + 1, *args[1:])
    )
    model.model.layers[-1].register_forward_hook(
        lambda module, args, output: output + 1
    )
    with torch.device("meta"):  # the program's default is not that of the windows
        value = sparsellm.evaluate(model, ids).value
    assert value == pytest.approx(math.exp(losses_by_hand(ids, model).mean()), rel=1e-5)


def test_a_text_that_was_calibrated_on_flatters_as_a_part_too(
    llama: Path, text: Path, run: Any
) -> None:
    for at, source in enumerate((str(text), f"file:{text}", f"pydoc:1,{text}:1")):
        out = llama.with_name(f"flattered-{at}")
        run(
            "prune",
            llama,
            "--out",
            out,
            "--method",
            "magnitude",
            "--calibration",
            source,
            "--seq-len",
            16,
            exits=0,
        )
        assert (
            "flatters its numbers"
            in run("eval", out, "--text", f"file:{text}", "--seq-len", 16, exits=0)[2]
        )
    # longer than any name
    assert "unknown text source" in run("eval", out, "--text", "a" * 300, exits=2)[2]


def test_a_name_that_is_not_utf8_is_refused_before_the_work(
    pruned: Path, tmp_path: Path, refusal: Any
) -> None:
    name = tmp_path / os.fsdecode(b"caf\xe9.txt")
    name.write_text("some text")
    assert "cannot be read" in refusal("eval", pruned, "--text", name)


def test_a_loss_that_is_not_finite_is_an_error(text: Path) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.inf
    with pytest.raises(
        NumericalError, match=r"loss or divergence of window 0 is not finite: .*float32"
    ):
        sparsellm.evaluate(model, by_hand(text, bos=True))
