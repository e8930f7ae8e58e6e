"""The calibration text of a run → windows of token ids, for the statistics and for the sweep."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsellm import machine, parallel
from sparsellm.errors import DataError
from sparsellm.files.cache import cache_dir, cached
from sparsellm.files.reader import CheckpointReader
from sparsellm.method.sweep.whole_model import cut_to
from sparsellm.model import Chain
from sparsellm.model.open import check_vocabulary
from sparsellm.model.streams import check_forward, windows_of
from sparsellm.progress import Progress, ProgressCallback
from sparsellm.recipe import Recipe
from sparsellm.run.budget import Budget
from sparsellm.run.choice import Choice
from sparsellm.run.fingerprint import reading
from sparsellm.run.opening import Models, load_whole
from sparsellm.run.request import Request
from sparsellm.text.self_generated import self_generated_windows
from sparsellm.text.sources import DOCUMENTS, SELF, default_source, shares_of
from sparsellm.text.texts import Text
from sparsellm.text.windows import (
    calibration_windows,
    leading_token,
    mixed_windows,
    seq_len_of,
    windows_of_ids,
)


@dataclass(frozen=True)
class Windows:
    """Token ids."""

    sets: Tensor  # (sets, samples, seq): blocks take the sets in turn for their statistics
    fresh: Tensor  # (windows, seq): further windows, for the sweep; there may be none
    bos: str  # whether every window begins with BOS: yes or no, or given for token ids that the user passed
    # tokens in one forward call, by which windows are divided among processes
    batch_tokens: int
    passes: int = 0  # passes of the sweep with windows of their own, as far as the text suffices; 0: all take the same
    of_pass: int = 1  # windows of a pass
    divided: bool = False  # whether the windows of the statistics are divided into such passes; else they are one
    # for each window of sets, then fresh, the name of its text in a mixture
    sources: Sequence[str] = ()
    step_processes: int = 1  # processes that share a step of the sweep

    @property
    def first(self) -> Tensor:
        """The first set of all processes."""
        return self.sets[0]

    @property
    def own(self) -> list[Tensor]:
        """This process's share of each set."""
        return [self._share(windows) for windows in self.sets]

    @property
    def by_pass(self) -> list[Tensor]:
        """The windows of each pass of the sweep, for all processes together. New ones come first, since the pruned
        weights fit those of the statistics already. A sweep of more passes begins again with the first."""
        sets = (self.fresh, self.first if self.divided else self.first[:0])
        fresh, known = (
            list(filter(self.suffices, windows.split(self.of_pass))) for windows in sets
        )
        parts = [*fresh, *(known or [self.first])][: self.passes or 1]
        lead = int(self.first[0, 0]) if self.bos == "yes" else None
        return [
            _cut(part, lead, self.step_processes) if self.bos != "given" else part
            for part in parts
        ]

    def suffices(self, windows: Tensor) -> bool:
        """Whether these windows are enough for a pass: half as many as it has."""
        return 2 * len(windows) >= self.of_pass

    @property
    def swept(self) -> list[Tensor]:
        """This process's share of the windows of each pass."""
        return [self._share(part) for part in self.by_pass]

    def passes_over(self, tokens: int) -> int:
        """The number of passes that have this many tokens together, less the 1 % that cutting may drop."""
        sizes = itertools.cycle(part.numel() for part in self.by_pass)
        return next(
            number
            for number, total in enumerate(itertools.accumulate(sizes), 1)
            if 1.01 * total >= tokens
        )

    @property
    def swept_sources(self) -> list[str]:
        """The text of each window of ``swept[0]``, in a mixture."""
        if not self.sources:
            return []
        names = sorted(set(self.sources))  # their numbers take the places of token ids
        like = torch.tensor([names.index(name) for name in self.sources])[
            :, None
        ].expand(-1, self.first.shape[1])
        read = self.sets.shape[0] * self.sets.shape[1]
        numbers = replace(
            self,
            sets=like[:read].reshape(self.sets.shape),
            fresh=like[read:][: len(self.fresh)],
        )
        return [names[number] for number in numbers.swept[0][:, -1].tolist()]

    def _share(self, windows: Tensor) -> Tensor:
        return windows[
            parallel.own_slice(
                len(windows), windows_of(self.batch_tokens, windows.shape[1])
            )
        ]


def given_windows(
    ids: Tensor, chain: Chain, recipe: Recipe, choice: Choice, passes: int
) -> Windows:
    """The token ids ``(samples, seq)`` of the user, as one set. Raises DataError if they do not fit the model."""
    windows = check_vocabulary(
        windows_of_ids(ids, chain.config, bos=recipe.bos), chain.config
    )
    samples, seq_len = windows.shape
    of_pass = choice.windows_of_pass(samples, seq_len)
    divided = choice.sweep_tokens is not None
    return Windows(
        windows[None],
        windows[:0],
        "given",
        recipe.batch_tokens,
        passes,
        of_pass,
        divided,
    )


def read_windows(
    text: Text | str,
    recipe: Recipe,
    model: Models,
    choice: Choice,
    passes: int,
    progress: ProgressCallback,
) -> Windows:
    """Windows of a text, or of the one that the dense model writes if the recipe says so: the choice's sets for the
    statistics and further ones for ``passes`` passes, as far as there is room; DataError if there is none for a set."""
    chain = model.chain
    tokenizer = model.tokenizer
    directory = model.directory

    def tell(done: int, total: int) -> None:
        progress(Progress("calibration", done, total, "the model writes its text"))

    if tokenizer is None:
        raise DataError(
            "a model given as an object needs tokenizer=..., or token ids as calibration"
        )
    seq_len = seq_len_of(chain.config, recipe.seq_len)
    lead = leading_token(tokenizer, recipe.bos)
    seed = recipe.seed

    def draw(source: str, samples: int, fresh: int) -> Tensor:
        """Windows of one source, which may be the dense model."""
        if source != SELF:
            named = text if isinstance(text, Text) else source
            return calibration_windows(
                named, tokenizer, samples, seq_len, seed, recipe.bos, fresh
            )

        def write() -> Tensor:
            dense = chain.model
            if directory is not None:
                dense = load_whole(directory, chain.dtype, chain.device, model.trust)
            return self_generated_windows(
                dense, tokenizer, samples, seq_len, seed, lead, fresh, tell
            )

        words = sorted(tokenizer.get_vocab().items())
        asked = (
            samples,
            seq_len,
            seed,
            lead,
            fresh,
            words,
            tokenizer.eos_token_id,
            sorted(tokenizer.all_special_ids),
        )
        if chain.reader is None:
            return write()
        return _kept(chain.reader, chain, progress, asked, write)

    source = text if isinstance(text, str) else DOCUMENTS
    sets = choice.sets
    of_pass = choice.windows_of_pass(recipe.samples, seq_len)
    windows, sources = mixed_windows(
        source, [recipe.samples] * sets + [of_pass] * passes, draw
    )
    windows = check_vocabulary(windows, chain.config, tokenizer)
    samples = min(recipe.samples, len(windows))
    sets = min(sets, len(windows) // max(1, samples))
    read = windows[: sets * samples].view(sets, samples, -1)
    rest = windows[sets * samples :]
    bos = "no" if lead is None else "yes"
    fresh = rest[: passes * of_pass]
    divided = choice.sweep_tokens is not None
    return Windows(
        read, fresh, bos, recipe.batch_tokens, passes, of_pass, divided, sources
    )


def _kept(
    reader: CheckpointReader,
    chain: Chain,
    progress: ProgressCallback,
    asked: object,
    write: Callable[[], Tensor],
) -> Tensor:
    """The windows that a model writes for what is ``asked``, from the cache if they are there: it may take hours."""
    weights = reader.digests(partial(reading, progress))
    run = (torch.__version__, str(chain.dtype), chain.device.type)
    key = hashlib.sha256(
        repr((asked, run, chain.config.to_dict(), sorted(weights.items()))).encode()
    ).hexdigest()

    def make(folder: Path) -> Path:
        save_file({"windows": write()}, folder / "windows.safetensors")
        return folder / "windows.safetensors"

    file = cached(cache_dir() / "written" / f"{key}.safetensors", make)
    # a damaged file is named
    return CheckpointReader(file.parent, [file]).get("windows")


def _cut(windows: Tensor, lead: int | None, step_processes: int) -> Tensor:
    """Windows ``(windows, seq)`` cut to the tokens of a step that processes share; the rest at their ends is dropped.
    Each part begins with the id ``lead``, if there is one, in place of its first token."""
    part = cut_to(windows.shape[1], step_processes)
    shorter = windows[:, : windows.shape[1] // part * part].reshape(-1, part).clone()
    if lead is not None:
        shorter[:, 0] = lead
    return shorter


@dataclass(frozen=True)
class Calibration:
    """The windows of a run, and its settings with them."""

    recipe: Recipe  # with the text that was taken, and the actual windows
    choice: Choice  # with as many passes of the sweep as have its tokens
    windows: Windows
    warnings: tuple[str, ...]

    def check(self, chain: Chain) -> None:
        """Runs the model on a few tokens, and refuses more processes than windows. Raises a SparseLLMError."""
        windows = self.windows.first
        check_forward(chain, windows, token_states=self.choice.token_states)
        machine.trim()
        self.choice.check_processes(len(windows))


def draw_calibration(
    request: Request,
    choice: Choice,
    models: Models,
    budget: Budget,
    progress: ProgressCallback,
) -> Calibration:
    """Draws the windows that a choice asks for. Raises a SparseLLMError if the text cannot be read, is short, or does
    not fit the model."""
    progress(Progress("calibration", 0, 1))
    recipe = request.recipe
    chain = models.chain
    text = request.calibration
    warnings: list[str] = []
    if text is None and recipe.calibration is None:
        demo = "demo" in (request.model, request.teacher)
        source, warnings = parallel.from_main(partial(default_source, demo=demo))
        recipe = recipe.updated(calibration=source)
    # The sweep takes new windows where the dense model runs next to the pruned one.
    side_by_side = chain.reader is not None and models.teacher is None
    passes = choice.passes if side_by_side else 0
    by_tokens = choice.passes > 0 and recipe.passes is None
    tokens = choice.sweep_tokens if by_tokens else None
    if tokens is not None and not side_by_side:
        # all tokens at once: later passes have no others
        choice = replace(choice, passes=1)
    read: Callable[[], Windows]
    if isinstance(text, Tensor):
        read = partial(given_windows, text, chain, recipe, choice, passes)
    else:
        named = recipe.calibration if text is None else text
        assert named is not None  # the default source, if nothing else
        read = partial(read_windows, named, recipe, models, choice, passes, progress)
        if SELF in shares_of(recipe.calibration or "") and chain.reader is not None:
            parallel.from_main(partial(budget.check_writing, chain))
    windows = parallel.from_main(read)
    if tokens is not None:
        choice = replace(choice, passes=windows.passes_over(tokens))
    return Calibration(
        recipe.updated(samples=len(windows.first), seq_len=windows.first.shape[1]),
        choice,
        windows=windows,
        warnings=tuple(warnings),
    )
