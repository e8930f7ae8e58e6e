"""What a run ends with: its model against the dense one, on a little text that no run calibrates on.

The pruned and the dense model run on a few windows, one block in memory at a time. So a model that is read block by
block is read once more. The dense weights of a model in memory are gone by then: it runs before its first block is
pruned.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsellm import parallel
from sparsellm.errors import SparseLLMError
from sparsellm.evaluation.perplexity import Kept, measured
from sparsellm.files.reader import CheckpointReader
from sparsellm.model.open import check_vocabulary, load_tokenizer
from sparsellm.progress import PhaseClock, ProgressCallback
from sparsellm.recipe import Recipe
from sparsellm.records import HeldOut
from sparsellm.run.budget import Budget
from sparsellm.run.decided import Decided
from sparsellm.run.journal import Journal
from sparsellm.run.opening import Models
from sparsellm.text.windows import evaluation_windows, seq_len_of

UNMEASURED = "the result was not measured on held-out text"
MOST_WINDOWS = 8
MOST_WIDTH = 512  # tokens of a window


def held_out_text(recipe: Recipe) -> str:
    """The text that a run is measured on: the part of ``c4-sample`` or ``pydoc`` on which no run calibrates."""
    if recipe.calibration == "c4-sample":
        return "c4-sample"
    return "pydoc"


@dataclass
class HeldOutWindows:
    """The windows that a run is measured on at its end, and the dense model. The first process has them."""

    windows: Tensor | None = None  # token ids; None without a tokenizer to make them
    dense: Kept | None = None
    missing: str = ""  # why nothing is measured

    @classmethod
    def drawn(
        cls,
        models: Models,
        decided: Decided,
        clock: PhaseClock,
    ) -> HeldOutWindows:
        """The windows of a run. Where its dense weights will be overwritten, the dense model runs on them now."""
        held = cls()
        if not parallel.is_main():
            return held
        chain = models.chain
        with clock.phase("evaluate"), parallel.alone():
            try:
                held.windows = _windows(models, decided.recipe)
                held.dense = Kept(models.teacher or chain, "")
                if chain.reader is None and held.windows is not None:
                    held.dense.outputs(held.windows, lambda text: None)
            except SparseLLMError as error:
                held.missing = str(error)
        return held

    def measure(
        self,
        models: Models,
        decided: Decided,
        journal: Journal,
        budget: Budget,
        clock: PhaseClock,
        progress: ProgressCallback,
    ) -> tuple[HeldOut | None, list[str]]:
        """The measurement of the pruned model, or a warning that says why there is none: a run of hours does not fail
        for it. A model without a tokenizer reads no text, so it is not measured and not warned about. All processes
        return what the first one measures."""

        def make() -> tuple[HeldOut | None, list[str]]:
            if self.missing:
                return None, [f"{UNMEASURED}: {self.missing}"]
            windows = self.windows
            if windows is None:
                return None, []
            try:
                measurement = self._measured(
                    windows, models, decided, journal, budget, progress
                )
            except SparseLLMError as error:
                return None, [f"{UNMEASURED}: {error}"]
            return measurement, []

        with clock.phase("evaluate"):
            return parallel.from_main(make)

    def _measured(
        self,
        windows: Tensor,
        models: Models,
        decided: Decided,
        journal: Journal,
        budget: Budget,
        progress: ProgressCallback,
    ) -> HeldOut:
        chain = models.chain
        blocks = None
        if journal.writer is not None and chain.reader is not None:
            folder = journal.writer.folder
            shards = journal.writer.shards[: len(chain)]
            blocks = [CheckpointReader(folder, [shard]) for shard in shards]
        budget.check_measuring(chain)
        products = chain.products
        chain.products = None  # as `sparsellm eval` runs it
        try:
            perplexity, against = measured(
                chain, windows, self.dense, progress, blocks=blocks
            )
        finally:
            chain.products = products
        assert against is not None
        return HeldOut(
            text=held_out_text(decided.recipe),
            window=windows.shape[1],
            windows=len(windows),
            perplexity=perplexity.value,
            dense_perplexity=against.perplexity.value,
            kl=against.kl,
            agreement=against.agreement,
        )


def _windows(models: Models, recipe: Recipe) -> Tensor | None:
    """The windows, as long as those of the calibration, but not longer than ``MOST_WIDTH``. None without a
    tokenizer. Raises DataError for a text that cannot be read or is short."""
    tokenizer = models.tokenizer
    config = models.chain.config
    if tokenizer is None and models.directory is not None:
        tokenizer = load_tokenizer(models.directory, trust_remote_code=models.trust)
    if tokenizer is None:
        return None
    width = min(seq_len_of(config, recipe.seq_len), MOST_WIDTH)
    windows = evaluation_windows(
        held_out_text(recipe),
        tokenizer,
        width,
        max_tokens=MOST_WINDOWS * width,
        bos=recipe.bos,
    )
    return check_vocabulary(windows, config, tokenizer)
