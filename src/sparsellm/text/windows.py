"""Turns text into windows of token ids, ``(windows, seq_len)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
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
from sparsellm.text.texts import Text
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
    """Calibration windows, drawn at random from a source or a text; the same arguments return the same windows.

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
    lead = leading_token(tokenizer, bos)
    if lead is None:
        length = seq_len
    else:
        length = seq_len - 1
    generator = torch.Generator().manual_seed(seed)
    if isinstance(source, Text):
        text = source
    else:
        text = read_source(source, "calibration")
    read = partial(_tokens, text, tokenizer, lead)
    if text.per_document:
        return _led(
            _windows_of_documents(text, read, samples + fresh, length, generator), lead
        )
    ids = read(_joined(text, tokenizer, lead), least=length + 1)
    most = max(len(ids) - length, _MOST_REPEATED)
    if samples > most:
        few = f"{text.called} has {len(ids)} tokens, from which {most} windows of {seq_len} may be drawn"
        raise DataError(f"{few}, not {samples}; lower samples, or name a longer text")
    if samples * length > len(ids):
        few = f"{text.called} has {len(ids)} tokens, so that {samples} windows of {seq_len} overlap"
        warnings.warn(f"{few}; a longer text gives a better model", Note, stacklevel=2)
    return _led(
        ids.unfold(0, length, 1)[_offsets(len(ids), samples, fresh, length, generator)],
        lead,
    )


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
            why = f"its share of {sizes[0]} windows is none; raise its share, or take more windows"
            raise DataError(
                f"source {shown(name)} in text mixture {shown(source)}: {why}"
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
        if any(window is None for window in taken):
            break
        windows += [window for window in taken if window is not None]
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
    lead = leading_token(tokenizer, bos)
    if lead is None:
        length = seq_len
    else:
        length = seq_len - 1
    if isinstance(source, Text):
        text = source
    else:
        text = read_source(source, "evaluation")
    ids = _tokens(text, tokenizer, lead, _joined(text, tokenizer, lead), length)
    windows = len(ids) // length
    if text.most_windows is not None:
        windows = min(windows, text.most_windows)
    if max_tokens is not None:
        windows = min(windows, max_tokens // seq_len)
    return _led(ids[: windows * length].view(windows, length), lead)


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
        take = f"{windows} windows of {seq_len} tokens take {needed / 1e9:.1f} GB as token ids"
        raise DataError(
            f"{take}, and {free / 1e9:.1f} GB of memory are free; lower samples, effort or seq_len"
        )


def _joined(text: Text, tokenizer: PreTrainedTokenizerBase, lead: int | None) -> str:
    """The text as one string, with conversations written by the chat template. A DataError says that the template
    refuses one, or that memory is short."""
    parts = []
    size = 0
    free = machine.free_memory()
    for document in text.documents:
        if document is not None:  # data sets have nulls
            if not isinstance(document, str):
                document = _chat(document, tokenizer, lead)
            parts.append(document)
            size += len(document)
        if TOKENISING * size > max(1 << 28, free):  # before the next one is read
            raise _too_long(text, size, free, "more than ")
    return text.joiner.join(parts)


def _too_long(text: Text, characters: int, free: int, more: str = "") -> DataError:
    return DataError(
        f"{text.called} has {more}{characters / 1e6:.1f} million characters; tokenising it takes about "
        f"{TOKENISING * characters / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; give a part of it"
    )


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase, lead: int | None) -> str:
    """A conversation by the chat template, without the BOS that ``_led`` puts before windows."""
    try:
        if not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template")
        for message in messages:
            for field in ("role", "content"):
                if not isinstance(message[field], str):
                    raise DataError(f"a {field} is not a string")
        text = rendered(tokenizer, messages, asks=False)
    except DataError as error:
        raise DataError(f"a conversation of the text cannot be read: {error}") from None
    except (KeyError, TypeError) as error:  # not a list of messages
        raise DataError(
            f"a conversation of the text cannot be read: {one_line(error)}"
        ) from None
    if lead is None:
        return text
    return text.removeprefix(str(tokenizer.bos_token))


def _tokens(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    lead: int | None,
    joined: str,
    least: int = 0,
) -> Tensor:
    """The ids of a text, ``(tokens,)``, at least ``least``, without the BOS that ``_led`` puts before windows."""
    needed = TOKENISING * len(joined)
    # asking takes a millisecond
    if needed > 1 << 28 and needed > (free := machine.free_memory()):
        raise _too_long(text, len(joined), free)
    # verbose=False: the warning that a text is longer than the model's positions does not apply here.
    ids = tokenizer(
        joined, verbose=False, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    if lead is not None and ids[:1] == [lead]:
        ids = ids[1:]
    if len(ids) < least:
        few = (
            f"{text.called} has {len(ids)} tokens and {least} are needed for one window"
        )
        raise DataError(f"{few}; lower seq_len, or name a longer text")
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _led(windows: Tensor, lead: int | None) -> Tensor:
    """The windows with BOS before each of them, if there is one."""
    if lead is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), lead), windows], dim=1)


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


def _windows_of_documents(
    text: Text,
    read: Callable[[str], Tensor],
    samples: int,
    length: int,
    generator: torch.Generator,
) -> Tensor:
    """A random window in each of ``samples`` random documents longer than a window, as SparseGPT reads C4."""
    windows: list[Tensor] = []
    misses = 0
    while len(windows) < samples:
        if misses == _MOST_MISSES or not len(text.documents):
            raise DataError(
                f"{text.called} has too few documents longer than {length} tokens ({len(windows)} of {samples} "
                f"found, and then {misses} shorter ones); lower seq_len"
            )
        ids = read(
            text.documents[
                int(torch.randint(len(text.documents), (), generator=generator))
            ]
        )
        misses += 1
        if len(ids) > length:
            misses = 0
            offset = int(torch.randint(len(ids) - length, (), generator=generator))
            windows.append(ids[offset : offset + length])
    return torch.stack(windows)
