"""Opens the models of a run, the dense one and the weights to prune, and draws the calibration windows."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import parallel
from sparsellm.errors import DataError, ModelError, RecipeError, one_line
from sparsellm.files.cache import cache_dir, cached
from sparsellm.files.files import explained
from sparsellm.files.reader import CheckpointReader, as_storage_error, open_checkpoint
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.inputs import read_object
from sparsellm.machine import bf16_is_native, machine_name, resolve_device
from sparsellm.method.sweep.whole_model import cut_to
from sparsellm.model import Chain, open_chain
from sparsellm.model.open import (
    check_vocabulary,
    load_config,
    load_tokenizer,
    shape_difference,
)
from sparsellm.model.products import Bf16Products
from sparsellm.model.streams import windows_of
from sparsellm.progress import Progress, ProgressCallback
from sparsellm.recipe import Recipe
from sparsellm.run.choice import Choice
from sparsellm.run.fingerprint import reading
from sparsellm.text.self_generated import self_generated_windows
from sparsellm.text.sources import DOCUMENTS, SELF
from sparsellm.text.texts import Text
from sparsellm.text.windows import (
    calibration_windows,
    leading_token,
    mixed_windows,
    seq_len_of,
    windows_of_ids,
)
from sparsepack.checkpoint import is_packed
from sparsepack.files import config_difference
from sparsepack.loading import load

Model = str | os.PathLike[str] | PreTrainedModel


@dataclass(frozen=True)
class Models:
    """The models of a run."""

    chain: Chain  # the model to prune, or a teacher of the same shapes
    start: CheckpointReader | None  # the weights to prune, if they are not the chain's
    teacher: Chain | None  # the dense model, if its weights have other shapes
    directory: Path | None  # that of the chain; None for a model given as an object
    dense: Path | None  # that of the dense model
    # the model that is pruned in memory; None if it is read block by block
    in_memory: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None  # None for token ids
    sources: tuple[Path, ...]  # directories that the result must not replace
    trust: bool  # whether modelling code of the checkpoint runs


def open_models(
    model: Model,
    teacher: str | os.PathLike[str] | None,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text: bool,
    loaded: bool,
    trust: bool,
) -> Models:
    """Opens the model and its teacher, as in :func:`sparsellm.prune`: with a tokenizer for a ``text``, in memory if
    ``loaded``, with the checkpoint's code if ``trust``. SparseLLMError if one cannot be opened, or they do not fit."""
    if teacher is not None and (loaded or isinstance(model, PreTrainedModel)):
        raise RecipeError(
            "teacher needs models on disk: give model and teacher by name, and out=DIR"
        )
    named = (
        {"model": model} if teacher is None else {"model": model, "teacher": teacher}
    )
    check = partial(load_config, trust_remote_code=trust)
    sources = [
        parallel.main_first(
            partial(
                checkpoint_directory,
                str(given),
                argument,
                check,
                dtype=recipe.dtype,
            )
        )
        for argument, given in named.items()
        if not isinstance(given, PreTrainedModel)
    ]
    directory = sources[-1] if sources else None
    if (
        loaded
        and directory is not None
        and is_packed(read_object(directory / "config.json"))
    ):
        raise RecipeError(
            f"{directory} is packed, and a packed model is not pruned in memory; give out=DIR"
        )
    if isinstance(model, PreTrainedModel) and any(
        hasattr(module, "base_layer") for module in model.modules()
    ):
        raise ModelError(
            "the model has adapters; merge them first (merge_and_unload), or give the model without them"
        )
    dense = directory
    chain, in_memory = open_model(
        model if teacher is None else teacher, directory, recipe, trust, load=loaded
    )
    if tokenizer is None and directory is not None and text:
        tokenizer = load_tokenizer(directory, trust_remote_code=trust)
    start = None
    taught_by = None
    if teacher is not None:
        start = open_checkpoint(sources[0])
        _check_teacher(chain, start, tokenizer if text else None, trust)
        assert chain.reader is not None
        if shape_difference(start, chain.reader) is not None:
            start = None
            taught_by = chain
            directory = sources[0]
            chain, _ = open_model(model, directory, recipe, trust, load=False)
    # the directory that a model in memory was loaded from
    name = getattr(model, "name_or_path", "")
    if not sources and name and Path(name).is_dir():
        sources = [Path(name)]
    return Models(
        chain,
        start,
        teacher=taught_by,
        directory=directory,
        dense=dense,
        in_memory=in_memory,
        tokenizer=tokenizer,
        sources=tuple(sources),
        trust=trust,
    )


def device_of(model: Model, recipe: Recipe) -> torch.device:
    """The device of a model that is an object (a ModelError if it has none, or several), else that of the recipe."""
    if isinstance(model, PreTrainedModel):
        if (
            len({parameter.device for parameter in model.parameters()}) > 1
            or model.device.type == "meta"
        ):
            raise ModelError(
                "the model's weights are on several devices, or not in memory; load it without device_map, or give it "
                "by name, so that it is read block by block"
            )
        return model.device
    return resolve_device(parallel.own_device(recipe.device))


def open_model(
    model: Model, directory: Path | None, recipe: Recipe, trust: bool, *, load: bool
) -> tuple[Chain, PreTrainedModel | None]:
    """A chain over a model, or over its checkpoint in ``directory``, which is loaded if ``load``; and the model itself
    if it is in memory. Raises RecipeError if the recipe sets device or dtype for a model that is in memory already."""
    device = device_of(model, recipe)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    loaded = None
    named = " and ".join(
        name for name in ("dtype", "products") if getattr(recipe, name) == "bfloat16"
    )
    if named and device.type == "cuda" and not bf16_is_native(device):
        raise RecipeError(
            f"{machine_name(device)} has no units for bfloat16; give {named} float32 or auto"
        )
    if isinstance(model, PreTrainedModel):
        if not model.can_generate():
            raise ModelError(
                f"the model is a {type(model).__name__}, without a head; load it by AutoModelForCausalLM"
            )
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise ModelError(
                "the model was made in torch.inference_mode, and cannot be changed; load it outside"
            )
        if recipe.device != "auto" or dtype is not None:
            raise RecipeError(
                "a model given as an object runs where and as it is: leave device and dtype 'auto'"
            )
        chain = open_chain(model, device=device)
        loaded = model
    else:
        assert directory is not None
        chain = open_chain(
            directory, device=device, dtype=dtype, trust_remote_code=trust
        )
        if load:
            loaded = load_whole(directory, chain.dtype, device, trust)
            chain = open_chain(loaded, device=device)
    set_products(chain, recipe)
    return chain, loaded


def set_products(chain: Chain, recipe: Recipe) -> None:
    """Sets the dtype in which blocks multiply fp32 matrices."""
    if recipe.products == "bfloat16" or (
        recipe.products == "auto" and bf16_is_native(chain.device)
    ):
        chain.products = Bf16Products()


def load_whole(
    directory: Path, dtype: str | torch.dtype, device: str | torch.device, trust: bool
) -> PreTrainedModel:
    """The model of a directory, in memory. Raises StorageError if transformers cannot load it."""
    with as_storage_error():
        return load(
            directory,
            device=device,
            dtype=dtype,
            activations="fp32",
            trust_remote_code=trust,
        )


def save_companions(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Writes config, generation config and tokenizer of a model that was given as an object, as transformers does.
    Raises ModelError if one of them has settings that transformers does not write."""
    config = copy.deepcopy(model.config)
    head = model.get_output_embeddings()
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    # which the caller may have tied, or untied, since the config was written
    if head is not None:
        config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings
    for part in (config, getattr(model, "generation_config", None), tokenizer):
        try:
            with explained(folder):
                if part is not None:
                    part.save_pretrained(folder)
        except ValueError as error:
            why = one_line(error)
            raise ModelError(
                f"transformers does not save the model's {type(part).__name__}: {why}"
            ) from None


def _check_teacher(
    teacher: Chain,
    start: CheckpointReader,
    tokenizer: PreTrainedTokenizerBase | None,
    trust: bool,
) -> None:
    """Refuses a teacher whose tokenizer differs from that of the model to prune, or a weight outside the blocks, or, if
    all weights have the same shapes, the config. Raises ModelError; StorageError if a weight is unreadable."""
    dense = teacher.reader
    directory = start.directory
    why = None
    assert dense is not None
    if shape_difference(start, dense) is None:
        why = config_difference(
            load_config(directory, trust_remote_code=trust).to_dict(),
            teacher.config.to_dict(),
        )
    if why is None and tokenizer is not None:
        alike = (
            load_tokenizer(directory, trust_remote_code=trust).get_vocab()
            == tokenizer.get_vocab()
        )
        why = None if alike else "the tokenizers differ"
    for name in teacher.outer_tensors() if why is None else ():
        if name not in start:
            why = f"weight {name} is missing"
            break
        if not torch.equal(dense.get(name), start.get(name, dtype=dense.dtype(name))):
            why = f"weight {name}, outside the blocks, has other values"
    if why is not None:
        advice = "give the dense model that this one was pruned from"
        raise ModelError(
            f"{dense.directory} cannot be the teacher of {directory}: {why}; {advice}"
        )


@dataclass(frozen=True)
class Windows:
    """Token ids."""

    sets: Tensor  # (sets, samples, seq): blocks take the sets in turn for their statistics
    fresh: Tensor  # (windows, seq): further windows, for the sweep; there may be none
    bos: str  # whether every window begins with BOS: yes or no, or given for token ids that the user passed
    batch_tokens: (
        int  # tokens in one forward call, by which windows are divided among processes
    )
    passes: int = 0  # passes of the sweep that ``fresh`` is for, as far as the text has room; 0: all have one set
    of_pass: int = 1  # windows of a pass
    divided: bool = False  # whether those of the statistics are divided into such passes, and not one pass
    # for each window of sets, then fresh, the name of its text in a mixture
    sources: Sequence[str] = ()
    sharers: int = 1  # processes that share a step of the sweep

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
        """The windows of each pass, of all processes: new ones as far as there are any, then those of the statistics,
        which the pruned weights fit already. After the last, they come again in turn."""
        sets = (self.fresh, self.first if self.divided else self.first[:0])
        fresh, known = (
            list(filter(self.suffices, windows.split(self.of_pass))) for windows in sets
        )
        parts = [*fresh, *(known or [self.first])][: self.passes or 1]
        lead = int(self.first[0, 0]) if self.bos == "yes" else None
        return [
            _cut(part, lead, self.sharers) if self.bos != "given" else part
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
        """The passes that have this number of tokens, less the 1 % that cutting may drop: more if a text is short."""
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
            parallel.share(
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
            dense = (
                chain.model
                if directory is None
                else load_whole(directory, chain.dtype, chain.device, model.trust)
            )
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
        return write() if chain.reader is None else _kept(chain, progress, asked, write)

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
    chain: Chain, progress: ProgressCallback, asked: object, write: Callable[[], Tensor]
) -> Tensor:
    """The windows that a model writes for what is ``asked``, from the cache if they are there: it may take hours."""
    weights = (
        chain.reader.digests(partial(reading, progress))
        if chain.reader is not None
        else {}
    )
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


def _cut(windows: Tensor, lead: int | None, sharers: int) -> Tensor:
    """Windows ``(windows, seq)`` cut to the tokens of a step that ``sharers`` processes share; the rest at their ends
    is dropped. Each part begins with the id ``lead``, if there is one, in place of its first token."""
    part = cut_to(windows.shape[1], sharers)
    shorter = windows[:, : windows.shape[1] // part * part].reshape(-1, part).clone()
    if lead is not None:
        shorter[:, 0] = lead
    return shorter
