"""The Python interface: :func:`prune`, :func:`evaluate`, :func:`inspect`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import arguments, machine, parallel
from sparsellm.arguments import Checkpoint, Model, checked
from sparsellm.convert import Head, PackResult, pack
from sparsellm.errors import DataError, MissingExtraError, RecipeError
from sparsellm.evaluation.perplexity import Kept, measured
from sparsellm.evaluation.speed import stamp
from sparsellm.evaluation.tasks import find_tasks, run_tasks
from sparsellm.files.contents import weights_difference
from sparsellm.files.resolve import checkpoint_directory, config_place
from sparsellm.files.results import append_result
from sparsellm.inputs import without_folders
from sparsellm.machine import resolve_device
from sparsellm.method.experts.fewer import Routing
from sparsellm.model import open_chain
from sparsellm.model.chain import outline
from sparsellm.model.open import check_vocabulary, load_tokenizer
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.recipe import Bos, Recipe
from sparsellm.records import (
    PRUNING,
    Benchmark,
    Continuation,
    Evaluation,
    Prediction,
    Protocol,
    read_pruning,
)
from sparsellm.report.card import card
from sparsellm.report.document import write_report
from sparsellm.run import prune as story
from sparsellm.run.counts import MatrixZeros, inspect_block, pruned_share
from sparsellm.run.estimate import foresee, named
from sparsellm.run.fingerprint import tokens_fingerprint
from sparsellm.run.held_out import held_out_text
from sparsellm.run.opening import load_whole, open_model, set_products
from sparsellm.run.request import Request
from sparsellm.run.result import PruneResult
from sparsellm.text.sources import DOCUMENTS, IDS, as_text, settle_calibration
from sparsellm.text.texts import Text
from sparsellm.text.windows import (
    check_seq_len,
    evaluation_windows,
    leading_token,
    seq_len_of,
    windows_of_ids,
)
from sparsepack.errors import Note

# the longest window and the tokens on which results are measured after a run
MEASURED_WINDOW = 2048
MEASURED_TOKENS = 16_384


@checked
def prune(  # noqa: PLR0913 - the Python door
    model: Model,
    recipe: arguments.RecipeGiven = None,
    *,
    out: arguments.Out | None = None,
    calibration: arguments.AnyText | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: Checkpoint | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
    **fields: Any,
) -> PruneResult:
    """Prunes a model block by block; after a kill, the same call resumes the run, with the same bits.

    A model given by name is read and written one block at a time; without ``out`` it is loaded into memory, in the
    dtype of its computation, and returned in ``result.model``. A model given as an object is pruned in place, and also
    saved if ``out`` is given. If several processes of torch.distributed call this alike, they divide the work.

    Args:
        model: a checkpoint directory, a hub id, a ``.gguf`` file, ``demo``, or a transformers model.
        recipe: all settings: a recipe, a mapping of its fields, or the path of a YAML file; ``Recipe()`` if None.
        out: the directory of the pruned checkpoint.
        calibration: replaces the recipe's: a text source, the path of a file, token ids ``(samples, seq)`` as a
            tensor, an array or lists of one length, or a data set with a column ``text`` or ``input_ids``.
        tokenizer: needed only for a model given as an object, unless ``calibration`` is token ids.
        teacher: the dense model by name, if ``model`` was made from it already: sweeps follow its predictions. Its
            tokenizer and its weights outside the blocks are those of ``model``.
        overwrite: replace the checkpoint that sparsellm wrote in ``out``.
        restart: remove an unfinished run into ``out`` and start again; where torchrun or Slurm starts the same command
            once more, its run is resumed nevertheless.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: called with the progress of the run.
        fields: fields of the recipe, such as ``sparsity=0.5``; they replace those of ``recipe``.

    Raises:
        SparseLLMError: a subclass of it that names the cause. All input is checked before the work.
    """
    given = (
        as_text(calibration, "calibration", "calibration")
        if calibration is not None
        else None
    )
    settled = settle_calibration(_recipe_of(recipe, fields), given)
    text = None if isinstance(given, str) else given  # the recipe contains a source
    request = Request(
        model,
        settled,
        out,
        text,
        tokenizer,
        overwrite,
        restart,
        trust_remote_code,
        teacher,
    )
    with _modes_kept(model):
        return story.prune(request, progress)


def _recipe_of(given: Any, fields: dict[str, Any]) -> Recipe:
    """The recipe of an argument, with fields that were given as keywords. Raises RecipeError."""
    recipe = Recipe.of(given)
    if fields:
        return recipe.updated(**fields)
    return recipe


@checked
def dry_run(
    model: Checkpoint,
    recipe: arguments.RecipeGiven = None,
    *,
    out: arguments.Out,
    teacher: Checkpoint | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
    **fields: Any,
) -> Prediction:
    """Estimates a run of :func:`prune`, or refuses what it does; downloads what is on the hub, and writes nothing."""
    settled = settle_calibration(_recipe_of(recipe, fields), None)
    request = Request(
        model,
        settled,
        out=out,
        overwrite=overwrite,
        restart=restart,
        trust_remote_code=trust_remote_code,
        teacher=teacher,
    )
    return story.rehearse(request, progress)


@checked
def plan(
    model: Checkpoint,
    recipe: arguments.RecipeGiven = None,
    *,
    ranks: arguments.Count = 1,
    gpu: arguments.Name | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> Prediction:
    """Estimates what :func:`prune` needs, by the config of a model alone: no weights are read.

    Args:
        model: as in :func:`prune` by name, or a ``config.json``.
        recipe: as in :func:`prune`; its ``memory`` is that of the machine.
        ranks: processes of torchrun that divide the work, with a GPU each if there are any.
        gpu: one of the table, such as ``h100``; None for this machine, which is measured.
        fields: as in :func:`prune`.

    Raises:
        SparseLLMError: the config cannot be read, the recipe does not fit it, or the GPU is not in the table.
    """
    settings = _recipe_of(recipe, fields)
    card = None if gpu is None else named(gpu)
    device = resolve_device(settings.device) if card is None else torch.device("cuda")
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    chain = outline(
        config_place(str(model), settings.dtype),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    set_products(chain, settings)
    prediction = foresee(chain, settings, ranks=ranks, gpu=card)
    return prediction.model_copy(update={"model": without_folders(str(model))})


@contextmanager
def _modes_kept(*models: object) -> Iterator[None]:
    """Puts every module of these models back into its mode: blocks run as in inference."""
    kept = [
        (part, part.training)
        for model in models
        if isinstance(model, PreTrainedModel)
        for part in model.modules()
    ]
    try:
        yield
    finally:
        for module, training in kept:
            module.training = training


@checked
def evaluate(  # noqa: PLR0913 - the Python door
    model: Model,
    text: arguments.AnyText,
    *,
    seq_len: arguments.SeqLen | None = None,
    max_tokens: arguments.Count | None = None,
    bos: Bos = "auto",
    against: Model | Opened | None = None,
    tasks: Sequence[str] | None = None,
    tasks_dir: arguments.PathGiven | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: arguments.DeviceName = "auto",
    dtype: arguments.DtypeName = "auto",
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> Evaluation:
    """Perplexity of a model, its divergence from a dense one, and tasks of lm-eval.

    For perplexity and divergence, models are read block by block and need not fit into memory; tasks load the model.
    Several processes divide the windows, and the first runs the tasks.

    Args:
        model, text, tokenizer, trust_remote_code, progress: as in :func:`prune`, the text as ``calibration``.
        seq_len: tokens in a window, 2 or more; None for 2048, or the limit of the model if that is less.
        max_tokens: the most tokens of the text to use.
        bos, device, dtype: as in :class:`Recipe`; a BOS is not scored.
        against: the dense model, with the same tokenizer, to compare with on the same windows; an :class:`Opened` runs
            only once for several evaluations. Recovery is None if this model is pruned too.
        tasks: names of tasks, groups or tags of lm-eval.
        tasks_dir: a directory with further tasks in lm-eval's YAML files.

    Raises:
        SparseLLMError: a model or the text cannot be read, the text is too short, the models have different tokenizers,
            or a task is unknown or fails. All but the failure of a task is checked before the work.
    """
    if tasks_dir is not None and not tasks:
        raise RecipeError("tasks_dir is given without tasks; name the tasks to run")
    manager = (
        find_tasks(tasks, Path(tasks_dir) if tasks_dir is not None else None)
        if tasks
        else None
    )
    words = as_text(text, "text", "evaluation")
    by_ids = isinstance(words, Tensor)
    progress(Progress("open", 0, 1))
    settings = Recipe(device=device, dtype=dtype, products="float32")
    with _modes_kept(model, against):
        opened = Opened(
            model,
            settings,
            trust_remote_code,
            tokenizer,
            with_tokenizer=not by_ids or manager is not None,
        )
        windows = parallel.from_main(
            partial(opened.windows, words, seq_len, max_tokens, bos)
        )
        tokenizer = opened.tokenizer
        results = None
        leads = tokenizer is not None and leading_token(tokenizer, bos) is not None
        if tasks and tokenizer is None:
            raise DataError("tasks on a model given as an object need tokenizer=...")
        if (
            tasks
            and tokenizer is not None
            and leads
            and leading_token(tokenizer) is None
        ):
            raise DataError(
                "bos is 'yes', and lm-eval puts BOS only where the tokenizer does by itself; leave bos out"
            )
        if against is not None and not isinstance(against, Opened):
            against = Opened(
                against,
                settings,
                trust_remote_code,
                with_tokenizer=not by_ids,
                argument="against",
            )
        if against is not None:
            opened.check_comparable(against, windows)
        if tasks and tokenizer is not None:  # first, since a task may fail
            progress(Progress("evaluate", 0, 1, "tasks"))
            results = parallel.from_main(
                lambda: run_tasks(
                    opened.in_memory(), tokenizer, tasks, manager, bos=leads
                )
            )
        with machine.computing(opened.chain.device):
            perplexity, compared = measured(
                opened.chain,
                windows,
                None if against is None else against.kept,
                progress,
            )
        if compared is not None and against is not None and against.is_pruned:
            compared = compared.model_copy(update={"recovery": None})
    named = DOCUMENTS
    begins = "yes" if leads else "no"
    if isinstance(words, str):
        named = without_folders(words)
    elif by_ids:
        named = IDS
    if by_ids:
        begins = "given"
    return Evaluation(
        protocol=Protocol(
            text=named,
            digest=tokens_fingerprint(windows),
            window=windows.shape[1],
            windows=len(windows),
            tokens=windows.numel() - len(windows),
            bos=begins,
            dtype=str(opened.chain.dtype).removeprefix("torch."),
        ),
        perplexity=perplexity,
        against=compared,
        tasks=results,
        **vars(stamp(opened.chain.device)),
    )


def measure_held_out(
    checkpoint: Path, recipe: Recipe, against: Model, progress: ProgressCallback
) -> Evaluation:
    """Measures the checkpoint of a run with this recipe against the dense model, on text that no run calibrates on."""
    return evaluate(
        checkpoint,
        held_out_text(recipe),
        # the model has positions for its calibration windows
        seq_len=min(recipe.seq_len or MEASURED_WINDOW, MEASURED_WINDOW),
        max_tokens=MEASURED_TOKENS,
        bos=recipe.bos,
        against=against,
        device=recipe.device,
        progress=progress,
    )


def pack_and_measure(
    run: Request,
    packed: Path,
    against: Model,
    progress: ProgressCallback,
    *,
    head: Head | None = None,
) -> tuple[PackResult, Evaluation]:
    """Packs the checkpoint of a run into ``packed``, and measures that as :func:`measure_held_out` does. ``head`` is
    that of :func:`pack`."""
    result = pack(
        os.fspath(run.out or ""),
        out=packed,
        head=head,
        overwrite=run.overwrite,
        restart=run.restart,
        allow_copy=True,
        progress=progress,
    )
    return result, measure_held_out(result.path, run.recipe, against, progress)


@checked
def keep_results(
    directory: Checkpoint, results: Sequence[Evaluation | Benchmark | Continuation]
) -> None:
    """Adds results to those of a checkpoint (``results.json``), then writes its report and card again. Raises
    StorageError if :func:`prune` or ``pack`` did not write it, or, after results were added, if its card was edited."""
    read_pruning(directory := Path(directory).expanduser())
    for result in results:
        append_result(directory, result)
    with suppress(MissingExtraError):  # the run has said what to install
        write_report(directory)
    # last, since a card that has all results says that nothing is left to write
    card(directory)


class Opened:
    """A model to evaluate, or to evaluate several others against: its outputs on the windows are kept."""

    def __init__(
        self,
        model: Model,
        settings: Recipe,
        trust: bool,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        with_tokenizer: bool = True,
        argument: str = "model",
    ) -> None:
        given = model if isinstance(model, PreTrainedModel) else None
        self.name = (str(model) if given is None else str(given.name_or_path)) or type(
            model
        ).__name__
        self.tokenizer = tokenizer
        locate = partial(
            checkpoint_directory, str(model), argument, dtype=settings.dtype
        )
        self.directory = parallel.main_first(locate) if given is None else None
        self._trust = trust
        self.chain, _ = open_model(model, self.directory, settings, trust, load=False)
        self.kept = Kept(self.chain, without_folders(self.name))
        if tokenizer is None and self.directory is not None and with_tokenizer:
            self.tokenizer = load_tokenizer(self.directory, trust_remote_code=trust)

    @cached_property
    def is_pruned(self) -> bool:
        """Whether a run wrote the model, or blocks have zeros as no dense one has; that is read once."""
        return (
            self.directory is not None and (self.directory / PRUNING).is_file()
        ) or pruned_share(self.chain) > 0

    @checked
    def windows(
        self,
        text: str | Tensor | Text,
        seq_len: arguments.SeqLen | None,
        max_tokens: arguments.Count | None,
        bos: Bos,
    ) -> Tensor:
        """The windows to score, checked against the model."""
        config = self.chain.config
        if isinstance(text, Tensor):
            return check_vocabulary(
                windows_of_ids(text, config, seq_len, max_tokens, bos), config
            )
        seq_len = seq_len_of(config, seq_len)
        if self.tokenizer is None:
            raise DataError(
                "a model given as an object needs tokenizer=..., or token ids in place of a text"
            )
        windows = evaluation_windows(text, self.tokenizer, seq_len, max_tokens, bos)
        return check_vocabulary(windows, config, self.tokenizer)

    def check_comparable(self, dense: Opened, windows: Tensor) -> None:
        """Refuses a dense model whose tokenizer, vocabulary or number of positions does not fit (DataError)."""
        check_seq_len(dense.chain.config, windows.shape[1])
        sizes = [
            model.chain.config.get_text_config().vocab_size for model in (self, dense)
        ]
        differ = sizes[0] != sizes[1]
        if self.tokenizer is not None and dense.tokenizer is not None and not differ:
            sample = self.tokenizer.decode(windows[0])
            differ = self.tokenizer.get_vocab() != dense.tokenizer.get_vocab() or (
                self.tokenizer(sample)["input_ids"]
                != dense.tokenizer(sample)["input_ids"]
            )
        if differ:
            raise DataError(
                f"{self.name} and {dense.name} have different tokenizers ({sizes[0]} and {sizes[1]} tokens in the "
                "models), so their predictions do not compare; give against= the dense model that was pruned"
            )

    def in_memory(self) -> PreTrainedModel:
        """The complete model in memory."""
        if self.directory is not None:
            return load_whole(
                self.directory, self.chain.dtype, self.chain.device, self._trust
            )
        assert isinstance(self.chain.model, PreTrainedModel)
        return self.chain.model


@checked
def inspect(model: Checkpoint, *, trust_remote_code: bool = False) -> list[MatrixZeros]:
    """Zeros of every matrix in a checkpoint's blocks, read one by one; a SparseLLMError if it cannot be read. A warning
    says which weight files are not those that sparsellm wrote."""
    directory = checkpoint_directory(str(model))
    difference = weights_difference(directory)
    if difference is not None:
        warnings.warn(difference, Note, stacklevel=2)
    chain = open_chain(
        directory,
        device=torch.device("cpu"),
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
    )
    zeros: list[MatrixZeros] = []
    for index in range(len(chain)):
        with chain.block(index):
            zeros += inspect_block(chain, index)
    return zeros


@checked
def inspect_experts(model: Checkpoint, *, trust_remote_code: bool = False) -> Routing:
    """The mixtures of a model, by its config alone, and whether experts can be removed. Errors as :func:`plan`."""
    chain = outline(
        config_place(str(model)),
        device=torch.device("cpu"),
        trust_remote_code=trust_remote_code,
    )
    return Routing.of(chain)


__all__ = [
    "Evaluation",
    "MatrixZeros",
    "Opened",
    "PruneResult",
    "dry_run",
    "evaluate",
    "inspect",
]
__all__ += ["inspect_experts", "plan", "prune"]
