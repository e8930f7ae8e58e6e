"""What a user asks a run for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import parallel
from sparsellm.files.directory import check_destination
from sparsellm.recipe import Recipe
from sparsellm.text.texts import Text

Model = str | os.PathLike[str] | PreTrainedModel


@dataclass(frozen=True)
class Request:
    """The arguments of ``sparsellm.prune``, documented there."""

    model: Model
    recipe: Recipe
    out: str | os.PathLike[str] | None = None
    calibration: Tensor | Text | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    overwrite: bool = False
    restart: bool = False
    trust_remote_code: bool = False
    teacher: str | os.PathLike[str] | None = None

    @property
    def called(self) -> str:
        """The name by which the user gave the model; empty for an object."""
        model = self.model
        # the run after a removal of experts, whose model is a directory of ours
        if self.recipe.experts is not None and self.teacher is not None:
            model = self.teacher
        if isinstance(model, PreTrainedModel):
            return ""
        return os.fspath(model)

    def destination(
        self, sources: Iterable[str | os.PathLike[str]] = (), need_bytes: int = 0
    ) -> Path | None:
        """The result's directory, resolved and checked by the first process (StorageError); None for one in memory."""
        if self.out is None:
            return None
        check = partial(check_destination, self.out, overwrite=self.overwrite)
        return Path(
            parallel.from_main(partial(check, sources=sources, need_bytes=need_bytes))
        )
