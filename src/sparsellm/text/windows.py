"""Turns text into windows of token ids, ``(windows, seq_len)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sparsellm import machine
from sparsellm.errors import DataError, one_line, shown
from sparsellm.inputs import without_folders
from sparsellm.patterns import round_exactly
from sparsellm.recipe import Bos
from sparsellm.text.conversations import rendered
from sparsellm.text.sources import read_source, shares_of
from sparsellm.text.texts import Split, Text
from sparsepack.errors import Note
from sparsepack.files import context_limit

Given = str | Text  # the name of a source, or documents

DEFAULT_SEQ_LEN = 2048  # the window of the pruning papers
TOKENISING = 200  # bytes that fast tokenizers hold for each character of a text; 172 to 262 were measured
_MOST_MISSES = 10_000  # documents in a row that are too short, before a source is refused for having too few long ones
_MOST_REPEATED = 1024  # windows that may be drawn from a text of any length; more that overlap only repeat the text


def leading_token(tokenizer: PreTrainedTokenizerBase, bos: Bos = "auto") -> int | None:
    """The beginning-of-text token (BOS) with which every window begins, or None for windows cut anywhere.

    ``auto`` takes BOS where the tokenizer puts it before a text by itself. ``no`` is the protocol of the papers: a text
    begins by the tokenizer's defaults, windows begin anywhere. A DataError for ``yes`` and a tokenizer without BOS."""
    token = tokenizer.bos_token_id
    if bos == "yes":
        if token is None:
            raise DataError(
                "bos is 'yes', and the tokenizer has no beginning-of-text token; give bos 'auto' or 'no'"
            )
        return int(token)
    adds = (
        bos == "auto"
        and token is not None
        and tokenizer("a", verbose=False)["input_ids"][:1] == [token]
    )
    if adds:
        return int(token)
    return None


def calibration_windows(
    source: Given,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    bos: Bos = "auto",
    fresh: int = 0,
) -> Tensor:
    """Calibration windows, drawn at random from a source, a mixture or a text. The same arguments return the same ones.

    The papers draw offsets into the joined text independently (SparseGPT 2301.00774, GPTQ 2210.17323), so windows may
    overlap. Here they do not overlap if the text is long enough: disjoint windows carry more information at the same
    cost, because a repeated token only adds weight in a Gram matrix. A shorter text is drawn from as in the papers.

    Returns ``(samples + up to fresh, seq_len)`` int64 token ids, on the CPU; ``seq_len`` includes BOS, if a window
    begins with it (``leading_token``). Fresh windows overlap with no other, so a short text may have fewer or none;
    those of documents (``c4``) may overlap. Raises DataError if the source cannot be read, the text is too short for
    one window, the text or the memory is too small for all windows, or the tokenizer has no BOS to begin with."""
    if isinstance(source, str) and len(shares_of(source)) > 1:
        return mixed_windows(
            source,
            [samples, fresh],
            lambda part, count, more: calibration_windows(
                part, tokenizer, count, seq_len, seed, bos, more
            ),
        )[0]
    check_memory(samples, seq_len)
    reader = _Reader(source, "calibration", tokenizer, bos, seq_len)
    generator = torch.Generator().manual_seed(seed)
    if reader.text.per_document:
        return reader.windows_of_documents(samples + fresh, generator)
    length = reader.length
    ids = reader.tokens(reader.joined(), least=length + 1)
    said = f"{reader.text.called} has {len(ids)} tokens"
    most = max(len(ids) - length, _MOST_REPEATED)
    if samples > most:
        raise DataError(
            f"{said}, from which {most} windows of {seq_len} may be drawn, not {samples}; lower samples, or name a "
            "longer text"
        )
    if samples * length > len(ids):
        warnings.warn(
            f"{said}, so that {samples} windows of {seq_len} overlap; a longer text gives a better model",
            Note,
            stacklevel=2,
        )
    offsets = _offsets(len(ids), samples, fresh, length, generator)
    return reader.led(ids.unfold(0, length, 1)[offsets])


def mixed_windows(
    source: str, sizes: list[int], draw: Callable[[str, int, int], Tensor]
) -> tuple[Tensor, list[str]]:
    """The windows of a mixture in groups of these ``sizes``, such as the sets of a walk and the passes of a sweep.

    In each group every source has its share of the windows, rounded by largest remainders, and they are interleaved
    evenly, so that a batch has windows of all. ``draw(source, samples, fresh)`` returns the windows ``(samples + up to
    fresh, seq)`` of one source. Where a source is too short for a further group, groups end.

    Returns the windows ``(windows, seq)``, and the name of each window's source, without folders (none for a source
    alone). Raises DataError if a source gets no window of the first group, or cannot be drawn from."""
    shares = shares_of(source)
    if len(shares) == 1:
        return draw(source, sizes[0], sum(sizes[1:])), []
    names = [without_folders(name) for name in shares]
    counts = [
        round_exactly(
            [share * size for share in shares.values()],
            size,
            ([0] * len(shares), [size] * len(shares)),
        )
        for size in sizes
    ]
    for name, first in zip(shares, counts[0], strict=True):
        if not first:
            raise DataError(
                f"source {shown(name)} in text mixture {shown(source)}: its share of {sizes[0]} windows is none; raise "
                "its share, or take more windows"
            )
    drawn = [
        iter(draw(name, size, sum(more)))
        for name, size, *more in zip(shares, *counts, strict=True)
    ]
    windows: list[Tensor] = []
    sources: list[str] = []
    for group in counts:
        places = sorted(
            ((k + 0.5) / size, number)
            for number, size in enumerate(group)
            for k in range(size)
        )
        taken = [next(drawn[number], None) for _, number in places]
        given = [window for window in taken if window is not None]
        if len(given) < len(taken):
            break
        windows += given
        sources += [names[number] for _, number in places]
    return torch.stack(windows), sources


def spread_evenly(count: int, total: int) -> set[int]:
    """``count`` of the numbers below ``total``, as far from each other and from both ends as possible. They number what
    is held out of a fit."""
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}


def windows_of_ids(
    ids: Tensor,
    config: PretrainedConfig,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    bos: Bos = "auto",
) -> Tensor:
    """The windows ``(windows, tokens)`` of token ids that a user passed, up to ``max_tokens`` tokens. Raises DataError
    if the windows are longer than the model's positions, or not ``seq_len`` long, or ``bos`` is set."""
    width = ids.shape[1]
    if bos != "auto":
        raise DataError(
            f"bos is {bos!r}, and token ids are used as they are; leave bos out, and begin windows with it"
        )
    if seq_len is not None and seq_len != width:
        raise DataError(
            f"seq_len is {seq_len}, and the token ids are windows of {width}; leave seq_len out"
        )
    check_seq_len(config, width)
    if max_tokens is None:
        return ids
    if max_tokens < width:
        raise DataError(
            f"max_tokens is {max_tokens}, less than one window of {width}; raise it"
        )
    return ids[: max_tokens // width]


def evaluation_windows(
    source: Given,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    max_tokens: int | None = None,
    bos: Bos = "auto",
) -> Tensor:
    """The text cut into consecutive windows; the remainder at the end is dropped, as in the papers.

    Returns ``(windows, seq_len)`` int64 token ids, on the CPU, with BOS as in ``calibration_windows``; only the
    first windows that fit in ``max_tokens``, if that is given. Raises DataError if the source cannot be read, text or
    ``max_tokens`` is shorter than one window, or the tokenizer has no BOS to begin with."""
    if max_tokens is not None and max_tokens < seq_len:
        raise DataError(
            f"max_tokens is {max_tokens}, less than one window of {seq_len}; raise it or lower seq_len"
        )
    reader = _Reader(source, "evaluation", tokenizer, bos, seq_len)
    length = reader.length
    ids = reader.tokens(reader.joined(), least=length)
    windows = len(ids) // length
    if reader.text.most_windows is not None:
        windows = min(windows, reader.text.most_windows)
    if max_tokens is not None:
        windows = min(windows, max_tokens // seq_len)
    return reader.led(ids[: windows * length].view(windows, length))


def seq_len_of(config: PretrainedConfig, asked: int | None) -> int:
    """The tokens of a window: as many as asked for, else 2048, or the model's positions if these are fewer. Errors are
    those of ``check_seq_len``."""
    seq_len = asked or min(DEFAULT_SEQ_LEN, context_limit(config) or DEFAULT_SEQ_LEN)
    check_seq_len(config, seq_len)
    return seq_len


def check_seq_len(config: PretrainedConfig, seq_len: int) -> None:
    """Raises DataError for windows longer than a model has positions; a config without a limit takes any."""
    limit = context_limit(config)
    if limit is not None and limit < seq_len:
        raise DataError(
            f"seq_len is {seq_len}, and this model has {limit} positions; set seq_len to {limit} or less"
        )


def check_memory(windows: int, seq_len: int) -> None:
    """Refuses windows whose token ids do not fit into the memory, before anything is allocated."""
    needed = 8 * windows * seq_len
    free = machine.free_memory()
    if needed > free:
        raise DataError(
            f"{windows} windows of {seq_len} tokens take {needed / 1e9:.1f} GB as token ids, and {free / 1e9:.1f} GB "
            "of memory are free; lower samples, effort or seq_len"
        )


class _Reader:
    """A text, given or named, whose tokens are read. ``lead`` is the token with which every window begins, if there is
    one; ``length`` are the tokens of a window behind it."""

    def __init__(
        self,
        given: Given,
        split: Split,
        tokenizer: PreTrainedTokenizerBase,
        bos: Bos,
        seq_len: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.lead = leading_token(tokenizer, bos)
        self.length = seq_len if self.lead is None else seq_len - 1
        self.text = given if isinstance(given, Text) else read_source(given, split)

    def joined(self) -> str:
        """The text as one string, with conversations written by the chat template. A DataError says that the template
        refuses one, or that memory is short."""
        joiner = self.text.joiner
        parts = []
        size = -len(joiner)
        free = machine.free_memory()
        for document in self.text.documents:
            if document is not None:  # data sets have nulls
                if not isinstance(document, str):
                    document = self._chat(document)
                parts.append(document)
                size += len(joiner) + len(document)
            # before the next one is read
            if TOKENISING * size > max(1 << 28, free):
                raise self._too_long(size, free, "more than ")
        return joiner.join(parts)

    def _too_long(self, characters: int, free: int, more: str = "") -> DataError:
        return DataError(
            f"{self.text.called} has {more}{characters / 1e6:.1f} million characters; tokenising it takes about "
            f"{TOKENISING * characters / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; give a part of it"
        )

    def _chat(self, messages: Any) -> str:
        """A conversation by the chat template, without the BOS that ``led`` puts before windows."""
        try:
            if not self.tokenizer.chat_template:
                raise DataError("the tokenizer has no chat template")
            for message in messages:
                for field in ("role", "content"):
                    if not isinstance(message[field], str):
                        raise DataError(f"a {field} is not a string")
            text = rendered(self.tokenizer, messages, asks=False)
        except (DataError, KeyError, TypeError) as error:
            why = error if isinstance(error, DataError) else one_line(error)
            raise DataError(
                f"a conversation of the text cannot be read: {why}"
            ) from None
        if self.lead is None:
            return text
        return text.removeprefix(str(self.tokenizer.bos_token))

    def tokens(self, text: str, least: int = 0) -> Tensor:
        """The ids of a text, ``(tokens,)``, at least ``least``, without the BOS that ``led`` puts before windows. A
        DataError says that it has fewer, or that memory is short."""
        needed = TOKENISING * len(text)
        # asking takes a millisecond
        if needed > 1 << 28 and needed > (free := machine.free_memory()):
            raise self._too_long(len(text), free)
        # verbose=False: the warning that a text is longer than the model's positions does not apply here.
        ids = self.tokenizer(
            text,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        if self.lead is not None and ids[:1] == [self.lead]:
            ids = ids[1:]
        if len(ids) < least:
            raise DataError(
                f"{self.text.called} has {len(ids)} tokens and {least} are needed for one window; lower seq_len, or "
                "name a longer text"
            )
        return torch.tensor(ids, dtype=torch.int64, device="cpu")

    def led(self, windows: Tensor) -> Tensor:
        """The windows with BOS before each of them, if there is one."""
        if self.lead is None:
            return windows
        first = windows.new_full((len(windows), 1), self.lead)
        return torch.cat([first, windows], dim=1)

    def windows_of_documents(self, count: int, generator: torch.Generator) -> Tensor:
        """A random window in each of ``count`` random documents longer than a window, as SparseGPT reads C4."""
        documents = self.text.documents
        windows: list[Tensor] = []
        misses = 0
        while len(windows) < count:
            if misses == _MOST_MISSES or not len(documents):
                raise DataError(
                    f"{self.text.called} has too few documents longer than {self.length} tokens ({len(windows)} of "
                    f"{count} found, and then {misses} shorter ones); lower seq_len"
                )
            number = int(torch.randint(len(documents), (), generator=generator))
            ids = self.tokens(documents[number])
            misses += 1
            spare = len(ids) - self.length
            if spare > 0:
                misses = 0
                offset = int(torch.randint(spare, (), generator=generator))
                windows.append(ids[offset : offset + self.length])
        return self.led(torch.stack(windows))


def _offsets(
    tokens: int, samples: int, fresh: int, seq_len: int, generator: torch.Generator
) -> Tensor:
    """The offsets of the windows: disjoint if they fit, else independent draws, as in the papers.

    The tokens between disjoint windows are divided at random among the gaps. Windows are in random order, so that a few
    held-out ones are not all from one end of the text. Fresh ones lie in the gaps and do not change the others."""
    spare = tokens - samples * seq_len
    if spare < 0:
        return torch.randint(0, tokens - seq_len, (samples,), generator=generator)
    gaps = torch.randint(0, spare + 1, (samples,), generator=generator).sort().values
    offsets = gaps + seq_len * torch.arange(samples)
    order = torch.randperm(samples, generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), offsets + seq_len])
    room = torch.cat([offsets, torch.tensor([tokens])]) - starts
    # in each gap, unused
    before = (torch.rand(len(room), generator=generator) * (room % seq_len + 1)).long()
    between = [
        int(first) + seq_len * number
        for first, size in zip(starts + before, room, strict=True)
        for number in range(int(size) // seq_len)
    ]
    chosen = torch.randperm(len(between), generator=generator)[:fresh]
    return torch.cat([offsets[order], torch.tensor(between, dtype=torch.int64)[chosen]])
