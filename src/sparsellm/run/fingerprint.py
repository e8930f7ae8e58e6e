"""Short digests that identify a model or a set of calibration tokens."""

from __future__ import annotations

import hashlib
import json
from functools import partial

import torch
from torch import Tensor, nn

from sparsellm.chain import Chain
from sparsellm.errors import NumericalError
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.storage.reader import CheckpointReader, not_finite, raw_bytes

_PIECE = 1 << 22  # elements hashed at a time
_LENGTH = 16  # hexadecimal digits: enough to avoid collisions, short enough for a message
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")  # keys that transformers writes into a config


def weight_digests(model: Chain | CheckpointReader, progress: ProgressCallback = ignore) -> dict[str, str]:
    """SHA-256 of every weight of a model, by name. The whole model is read once, and every value checked.

    Raises:
        NumericalError: a weight is NaN or infinite; the message names it.
        StorageError: the checkpoint cannot be read.
    """
    report = partial(_report, progress)
    if isinstance(model, CheckpointReader):
        return model.digests(report)
    if model.reader is not None:
        return model.reader.digests(report)
    values = model.model.state_dict(keep_vars=True)
    total, done = sum(value.nbytes for value in values.values()), 0
    digests: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, nn.Parameter) and not_finite(value.detach()):  # buffers such as masks may be infinite
            raise NumericalError(f"weight {name} has NaN or infinite values; load the model again")
        digests[name] = _sha256(value)
        done += value.nbytes
        report(done, total)
    return digests


def start_fingerprint(start: CheckpointReader, digests: dict[str, str]) -> str:
    """A digest of the name, dtype, shape and values of every weight of a checkpoint."""
    described = "".join(f"{name} {start.stored_as(name)} {digests[name]}" for name in sorted(digests))
    return hashlib.sha256(described.encode()).hexdigest()[:_LENGTH]


def model_fingerprint(chain: Chain, digests: dict[str, str]) -> str:
    """A digest of the config, and of the name, dtype, shape and values of every weight of the unchanged model.

    It does not depend on paths, dates, or how the weights are divided into files.
    """
    config = {key: value for key, value in chain.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    reader = chain.reader
    values = chain.model.state_dict()
    for name in sorted(digests):
        kind = f"{values[name].dtype} {tuple(values[name].shape)}" if reader is None else reader.stored_as(name)
        digest.update(f"{name} {kind} {digests[name]}".encode())
    return digest.hexdigest()[:_LENGTH]


def tokens_fingerprint(windows: Tensor) -> str:
    """A digest of token ids ``(windows, seq)``."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + raw_bytes(windows.long())).hexdigest()[:_LENGTH]


def _report(progress: ProgressCallback, done: int, total: int) -> None:
    said = f"reading all weights once, for their checksums: {done / 1e9:.1f} of {total / 1e9:.1f} GB"
    progress(Progress("check", done, max(total, 1), said))


def _sha256(value: Tensor) -> str:
    digest = hashlib.sha256()
    for piece in value.detach().reshape(-1).split(_PIECE):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
