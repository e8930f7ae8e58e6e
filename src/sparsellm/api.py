"""The Python interface: :func:`prune`, :func:`evaluate`, :func:`inspect`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm.arguments import (
    AnyText,
    Checkpoint,
    Count,
    DeviceName,
    DtypeName,
    Model,
    Name,
    Out,
    PathGiven,
    RecipeGiven,
    SeqLen,
    checked,
)
from sparsellm.calibration import (
    Text,
    as_text,
    check_seq_len,
    evaluation_windows,
    leading_token,
    settle_calibration,
    windows_of_ids,
)
from sparsellm.calibration.given import DOCUMENTS, IDS
from sparsellm.chain import Chain, open_chain
from sparsellm.chain.open import check_vocabulary, load_tokenizer
from sparsellm.errors import DataError, RecipeError
from sparsellm.evaluation.measured import compared, perplexity_of
from sparsellm.evaluation.streamed import Kept, streamed_scores
from sparsellm.evaluation.tasks import find_tasks, run_tasks
from sparsellm.hub.card import rebuild_card
from sparsellm.hub.push import Pushed, push_checkpoint
from sparsellm.machine.heap import peak_rss
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.recipe import Bos, Recipe
from sparsellm.records import Evaluation, Protocol
from sparsellm.run.counts import MatrixZeros, inspect_block
from sparsellm.run.fingerprint import tokens_fingerprint
from sparsellm.run.prepare import Request, default_seq_len, open_model
from sparsellm.run.result import PruneResult, stamp, versions
from sparsellm.run.stages import execute
from sparsellm.sources.resolve import checkpoint_directory
from sparsepack.loading import load


@checked
def prune(  # noqa: PLR0913 - the Python door
    model: Model,
    recipe: RecipeGiven = None,
    *,
    out: Out | None = None,
    calibration: AnyText | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: Checkpoint | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> PruneResult:
    """Prunes a model block by block; after a kill, the same call resumes the run, with the same bits.

    A model given by name is read and written one block at a time; without ``out`` it is loaded whole and returned in
    ``result.model``. A model given as an object is pruned in place, and also saved if ``out`` is given. If several
    processes of torch.distributed call this with the same arguments, they divide the work.

    Args:
        model: a checkpoint directory, a hub id, a ``.gguf`` file, ``demo``, or a transformers model.
        recipe: all settings: a recipe, a mapping of its fields, or the path of a YAML file; ``Recipe()`` if None.
        out: the directory of the pruned checkpoint.
        calibration: replaces the recipe's: a text source, the path of a file, token ids ``(samples, seq)`` as a
            tensor, an array or lists of one length, or a data set with a column ``text`` or ``input_ids``.
        tokenizer: needed only for a model given as an object, unless ``calibration`` is token ids.
        teacher: the dense model by name, if ``model`` was pruned from it already: sweeps follow its predictions.
        overwrite: replace the checkpoint in ``out``.
        restart: start again instead of resuming an unfinished run into ``out``.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: called with the progress of the run.

    Raises:
        SparseLLMError: a subclass of it that names the cause. All input is checked before the work.
    """
    given = as_text(calibration, "calibration", "calibration") if calibration is not None else None
    settled = settle_calibration(Recipe.of(recipe), given)
    text = None if isinstance(given, str) else given  # the recipe contains a source
    request = Request(model, settled, out, text, tokenizer, overwrite, restart, trust_remote_code, teacher)
    return execute(request, progress)


@checked
def evaluate(  # noqa: PLR0913 - the Python door
    model: Model,
    text: AnyText,
    *,
    seq_len: SeqLen | None = None,
    max_tokens: Count | None = None,
    bos: Bos = "auto",
    against: Model | Dense | None = None,
    tasks: Sequence[str] | None = None,
    tasks_dir: PathGiven | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> Evaluation:
    """Perplexity of a model, its divergence from a dense one, and tasks of lm-eval.

    For perplexity and divergence, models are read block by block and need not fit into memory; tasks load the model.

    Args:
        model, tokenizer, trust_remote_code, progress: as in :func:`prune`.
        text: as ``calibration`` in :func:`prune`.
        seq_len: tokens in a window, 2 or more; None for 2048, or the limit of the model if that is less.
        max_tokens: the most tokens of the text to use.
        bos, device, dtype: as in :class:`Recipe`; a BOS is not scored.
        against: the dense model, with the same tokenizer, to compare with on the same windows; a :class:`Dense` runs
            only once for several evaluations.
        tasks: names of tasks, groups or tags of lm-eval.
        tasks_dir: a directory with further tasks in lm-eval's YAML files.

    Raises:
        SparseLLMError: a model or the text cannot be read, the text is too short, the models have different tokenizers,
            or a task is unknown or fails. All but the last is checked before the work.
    """
    if tasks_dir is not None and not tasks:
        raise RecipeError("tasks_dir is given without tasks; name the tasks to run")
    manager = find_tasks(tasks, Path(tasks_dir) if tasks_dir is not None else None) if tasks else None
    text = as_text(text, "text", "evaluation")
    progress(Progress("open", 0, 1))
    settings = Recipe(device=device, dtype=dtype, products="float32")
    open_one = partial(_Opened.of, settings=settings, trust=trust_remote_code)
    own = open_one(model, tokenizer, with_tokenizer=not isinstance(text, Tensor) or manager is not None)
    windows = own.windows(text, seq_len, max_tokens, bos)
    leads = own.leads(bos, exactly=manager is not None)
    kept = against if against is None or isinstance(against, Dense) else Dense(against)
    dense = None if kept is None else kept.open(partial(open_one, with_tokenizer=not isinstance(text, Tensor)))
    if dense is not None:
        own.check_comparable(dense, windows)
    scores = streamed_scores(own.chain, windows, None if kept is None else kept.outputs, progress=progress)
    results = None
    if tasks and own.tokenizer is not None:
        progress(Progress("evaluate", 0, 1, "tasks"))
        results = run_tasks(own.whole(device, dtype, trust_remote_code), own.tokenizer, tasks, manager, bos=leads)
    source = text if isinstance(text, str) else IDS if isinstance(text, Tensor) else DOCUMENTS
    return Evaluation(
        protocol=Protocol(
            text=source,
            digest=tokens_fingerprint(windows),
            window=windows.shape[1],
            windows=len(windows),
            tokens=windows.numel() - len(windows),
            bos="given" if isinstance(text, Tensor) else "yes" if leads else "no",
            dtype=str(own.chain.dtype).removeprefix("torch."),
        ),
        perplexity=perplexity_of(scores.loss),
        nll=float(scores.loss.mean()),
        against=None if dense is None else compared(dense.name, scores),
        tasks=results,
        **vars(stamp(own.chain.device)),
    )


@checked
def check_evaluation(
    model: Checkpoint,
    text: AnyText,
    *,
    seq_len: SeqLen | None = None,
    max_tokens: Count | None = None,
    bos: Bos = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Checks arguments that :func:`evaluate` will get after long work; reads the text, and runs no model.

    Raises:
        SparseLLMError: as :func:`evaluate` would.
    """
    settings = Recipe(device="cpu", products="float32")
    own = _Opened.of(model, None, settings=settings, trust=trust_remote_code, with_tokenizer=True)
    own.windows(as_text(text, "text", "evaluation"), seq_len, max_tokens, bos)


class Dense:
    """A dense model to evaluate others against: it is opened once, and its outputs on the windows are kept.

    Args:
        model: as in :func:`evaluate`.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.outputs: Kept | None = None
        self._opened: _Opened | None = None

    def open(self, open_one: Callable[..., _Opened]) -> _Opened:
        """The opened model."""
        if self._opened is None:
            self._opened = open_one(self.model, None, argument="against")
            self.outputs = Kept(self._opened.chain)
        return self._opened


@dataclass(frozen=True)
class _Opened:
    """A model to evaluate: its name, chain, directory (None for an object) and tokenizer (None if none is needed)."""

    name: str
    chain: Chain
    directory: Path | None
    tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def of(
        cls,
        model: Model,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        with_tokenizer: bool,
        settings: Recipe,
        trust: bool,
        argument: str = "model",
    ) -> _Opened:
        name = str(model.name_or_path) if isinstance(model, PreTrainedModel) else str(model)
        directory = None if isinstance(model, PreTrainedModel) else checkpoint_directory(name, argument)
        chain, _ = open_model(model, directory, settings, trust, whole=False)
        if tokenizer is None and directory is not None and with_tokenizer:
            tokenizer = load_tokenizer(directory, trust_remote_code=trust)
        return cls(name or type(model).__name__, chain, directory, tokenizer)

    def windows(self, text: str | Tensor | Text, seq_len: int | None, max_tokens: int | None, bos: Bos) -> Tensor:
        """The windows to score, checked against the model."""
        config = self.chain.config
        if isinstance(text, Tensor):
            return check_vocabulary(windows_of_ids(text, config, seq_len, max_tokens, bos), config)
        seq_len = seq_len or default_seq_len(self.chain)
        check_seq_len(config, seq_len)
        if self.tokenizer is None:
            raise DataError("a model given as an object needs tokenizer=..., or token ids in place of a text")
        windows = evaluation_windows(text, self.tokenizer, seq_len, max_tokens, bos)
        return check_vocabulary(windows, config, self.tokenizer)

    def leads(self, bos: Bos, *, exactly: bool) -> bool:
        """Whether texts begin with BOS; ``exactly`` if the tokenizer itself must put it there, as for lm-eval."""
        if self.tokenizer is None:
            if exactly:
                raise DataError("tasks on a model given as an object need tokenizer=...")
            return False
        leads = leading_token(self.tokenizer, bos) is not None
        if exactly and leads and leading_token(self.tokenizer) is None:
            raise DataError("bos is 'yes', and lm-eval puts BOS only where the tokenizer does by itself; leave bos out")
        return leads

    def check_comparable(self, dense: _Opened, windows: Tensor) -> None:
        """Refuses a dense model whose predictions of these windows are not comparable with this model's.

        Raises:
            DataError: its tokenizer, vocabulary or number of positions differs.
        """
        check_seq_len(dense.chain.config, windows.shape[1])
        sizes = [each.chain.config.get_text_config().vocab_size for each in (self, dense)]
        differ = sizes[0] != sizes[1]
        if self.tokenizer is not None and dense.tokenizer is not None and not differ:
            sample = self.tokenizer.decode(windows[0])
            differ = self.tokenizer.get_vocab() != dense.tokenizer.get_vocab() or (
                self.tokenizer(sample)["input_ids"] != dense.tokenizer(sample)["input_ids"]
            )
        if differ:
            raise DataError(
                f"{self.name} and {dense.name} have different tokenizers ({sizes[0]} and {sizes[1]} tokens in the "
                "models), so their predictions do not compare; give against= the dense model that was pruned"
            )

    def whole(self, device: str, dtype: str, trust: bool) -> PreTrainedModel:
        """The whole model in memory."""
        if self.directory is not None:
            return load(self.directory, device=device, dtype=dtype, trust_remote_code=trust)
        model = self.chain.model
        assert isinstance(model, PreTrainedModel)
        return model


@checked
def card(directory: Checkpoint, *, force: bool = False) -> Path:
    """Writes the model card (``README.md``) of a checkpoint anew, with the results of its evaluations.

    Args:
        directory: of a checkpoint that :func:`prune` wrote and :func:`evaluate` measured.
        force: replace a card that was edited.

    Returns:
        The path of the card.

    Raises:
        StorageError: the checkpoint was never evaluated, a file is damaged, or the card was edited. Nothing is
            overwritten then.
    """
    return rebuild_card(Path(directory).expanduser(), force=force)


@checked
def push(directory: Checkpoint, repo: Name, *, private: bool = False, revision: Name | None = None) -> Pushed:
    """Uploads a checkpoint to the Hugging Face hub in one commit, with the token that the hub's client finds.

    Args:
        directory: of the checkpoint. Files that are not part of it stay where they are.
        repo: ``owner/name``; created if the hub has none.
        private: create a private repository; an existing public one is refused.
        revision: the branch, created if there is none; None for the main one.

    Raises:
        StorageError: the directory is no checkpoint, or the hub cannot be reached or refuses.
    """
    return push_checkpoint(Path(directory).expanduser(), repo, private=private, revision=revision)


@checked
def inspect(model: Checkpoint, *, trust_remote_code: bool = False) -> list[MatrixZeros]:
    """The zeros of every matrix in the blocks of a checkpoint, linear or not; it is read one block at a time.

    Raises:
        SparseLLMError: there is no such checkpoint, or it cannot be read.
    """
    directory = checkpoint_directory(str(model))
    chain = open_chain(directory, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=trust_remote_code)
    zeros: list[MatrixZeros] = []
    for index in range(len(chain)):
        with chain.block(index):
            zeros += inspect_block(chain, index)
    return zeros


__all__ = [
    "Evaluation",
    "MatrixZeros",
    "PruneResult",
    "card",
    "evaluate",
    "inspect",
    "peak_rss",
    "prune",
    "push",
    "versions",
]
