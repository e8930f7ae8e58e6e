"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model in memory."""

from __future__ import annotations

import copy
import logging
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm.errors import (
    DataError,
    NumericalError,
    RecipeError,
    nearest,
    one_line,
    shown,
)
from sparsellm.files.gguf import without_bars
from sparsellm.records import Metric, Tasks
from sparsepack.errors import Note


def find_tasks(names: Sequence[str], folder: Path | None = None) -> Any:
    """lm-eval's TaskManager, which knows every task, group or tag that is named; ``folder`` has further tasks. Without
    lm-eval, the folder or a task, a RecipeError."""
    if folder is not None and not folder.is_dir():
        raise RecipeError(
            f"tasks_dir is {shown(str(folder))}, which is not a directory; name one with YAML files of tasks"
        )
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RecipeError(
            "tasks need lm-eval, which is not installed; pip install lm_eval"
        ) from None
    # its lines and bars would mix with those of the command line
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with without_bars():
        # lm-eval takes seconds to read the thousands of tasks of its own, which are often not needed.
        place = None if folder is None else str(folder)
        manager = TaskManager(include_path=place, include_defaults=folder is None)
        if folder is not None and not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=place)
    for name in names:
        if name not in manager.all_tasks:
            hint = nearest(name[:100], manager.all_tasks)
            if not hint.startswith("did"):
                hint = "`lm-eval ls tasks` lists all"
            raise RecipeError(
                f"unknown task {shown(name)}; {hint} (tasks_dir adds a directory of your own tasks)"
            )
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    *,
    bos: bool,
) -> Tasks:
    """Value and standard error of every metric of some tasks, whose manager ``find_tasks`` returned; groups and
    their members are listed alike. With ``bos``, lm-eval puts BOS before a text. A task that fails is a DataError, and
    one without a finite metric a NumericalError."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # lm-eval seeds the random numbers of Python, numpy and torch, and gives the tokenizer a token for padding.
    states = random.getstate(), np.random.get_state()
    # lm-eval calls it; a head that the caller untied stays so
    vars(model)["tie_weights"] = lambda *_, **__: None
    try:
        with without_bars(), torch.random.fork_rng([]):
            harness = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                backend="causal",
                add_bos_token=bos,
            )
            results = lm_eval.simple_evaluate(
                model=harness,
                tasks=list(names),
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
    except (
        Exception
    ) as error:  # from lm-eval, a task's own files, or the library that reads its data
        raise DataError(
            f"lm-eval cannot run {', '.join(names)}: {one_line(error)}"
        ) from error
    finally:
        del vars(model)["tie_weights"]
        random.setstate(states[0])
        np.random.set_state(states[1])
    return {
        name: metrics
        for name, values in results["results"].items()
        if (metrics := _metrics(name, values))
    }


def _metrics(task: str, values: Mapping[str, object]) -> dict[str, Metric]:
    """The metrics in lm-eval's results of one task, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    metrics: dict[str, Metric] = {}
    lost: list[str] = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if (
            not comma
            or metric.endswith("_stderr")
            or not isinstance(value, int | float)
        ):
            continue
        if not math.isfinite(value):
            lost.append(f"task {task}: {metric} is {value}")
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        stderr = None
        if isinstance(error, int | float) and math.isfinite(error):
            stderr = float(error)
        metrics[metric if filtered == "none" else key] = Metric(
            value=float(value), stderr=stderr
        )
    if lost and not metrics:
        raise NumericalError(
            f"{lost[0]}, and no metric is finite; activations may overflow, try --dtype float32"
        )
    for message in lost:
        warnings.warn(f"{message}, and is left out", Note, stacklevel=2)
    return metrics
