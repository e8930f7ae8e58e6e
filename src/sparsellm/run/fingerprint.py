"""Short digests that identify a model or a set of calibration tokens."""

from __future__ import annotations

import hashlib
import json
from functools import partial

import torch
from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.errors import NumericalError
from sparsellm.files.reader import PIECE, CheckpointReader, memory_of, not_finite
from sparsellm.model import Chain
from sparsellm.progress import Progress, ProgressCallback, ignore

# hexadecimal digits: enough to avoid collisions, short enough for a message
_LENGTH = 16
# keys that transformers writes into a config
_NOT_THE_MODEL = (
    "_name_or_path",
    "transformers_version",
)


def model_fingerprint(chain: Chain, progress: ProgressCallback = ignore) -> str:
    """A digest of the config, and of the name, dtype, shape and values of every weight of the unchanged model. It does
    not depend on paths, dates, or how the weights are divided into files.

    The whole model is read once, and every value checked; later reads are compared with what was read. Raises
    NumericalError with the name of a weight that is NaN or infinite, StorageError for an unreadable checkpoint."""
    config = {
        key: value
        for key, value in chain.config.to_dict().items()
        if key not in _NOT_THE_MODEL
    }
    weights = (
        _in_memory(chain.model, progress)
        if chain.reader is None
        else _on_disk(chain.reader, progress)
    )
    return _short(
        json.dumps(config, sort_keys=True, default=str).encode() + weights.encode()
    )


def start_fingerprint(start: CheckpointReader, progress: ProgressCallback) -> str:
    """Same as ``model_fingerprint``, for the weights of a checkpoint alone."""
    return _short(_on_disk(start, progress).encode())


def tokens_fingerprint(windows: Tensor) -> str:
    """A digest of token ids ``(windows, seq)``."""
    return _short(str(tuple(windows.shape)).encode() + memory_of(windows.long().cpu()))


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_LENGTH]


def _on_disk(reader: CheckpointReader, progress: ProgressCallback) -> str:
    digests = parallel.from_main(partial(reader.digests, partial(reading, progress)))
    reader.expect(digests)
    return "".join(
        f"{name} {reader.stored_as(name)} {digests[name]}" for name in sorted(digests)
    )


def _in_memory(model: nn.Module, progress: ProgressCallback) -> str:
    values = dict(sorted(model.state_dict(keep_vars=True).items()))
    done = 0
    weights = []
    total = sum(value.nbytes for value in values.values())
    for name, value in values.items():
        # buffers such as masks may be infinite
        if isinstance(value, nn.Parameter) and not_finite(value.detach()):
            raise NumericalError(
                f"weight {name} has NaN or infinite values; load the model again"
            )
        digest = hashlib.sha256()
        for piece in value.detach().reshape(-1).split(PIECE):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
        weights.append(
            f"{name} {value.dtype} {tuple(value.shape)} {digest.hexdigest()}"
        )
        done += value.nbytes
        reading(progress, done, total)
    return "".join(weights)


def reading(progress: ProgressCallback, done: int, total: int) -> None:
    """Tells how many bytes of all weights have been read for their checksums."""
    said = f"reading all weights once, for their checksums: {done / 1e9:.1f} of {total / 1e9:.1f} GB"
    progress(Progress("check", done, max(total, 1), said))
