"""Short digests that tell one model, or one set of calibration tokens, from another."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

from sparsellm.chain import Chain
from sparsellm.storage.reader import raw_bytes

_LENGTH = 16  # hexadecimal digits: enough against chance, short enough for a message

# What transformers writes into a config that says nothing of the model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


def model_fingerprint(chain: Chain) -> str:
    """Of the config, and of every weight its name, dtype, shape, first and last row.

    It does not depend on paths, dates or the way the weights are divided into files. Reading two rows of each weight
    takes a moment, and no training leaves them all as they were.
    """
    config: dict[str, Any] = {key: value for key, value in chain.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if chain.weights is not None:
        reader = chain.weights.reader
        for name in sorted(reader):
            digest.update(f"{name} {reader.dtype(name)} {reader.shape(name)}".encode())
            digest.update(reader.sample(name))
    else:
        for name, value in sorted(chain.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(raw_bytes(value[:1] if value.dim() > 1 else value))
            digest.update(raw_bytes(value[-1:] if value.dim() > 1 else value))
    return digest.hexdigest()[:_LENGTH]


def tokens_fingerprint(windows: Tensor) -> str:
    """Of token ids ``(windows, seq)``."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + raw_bytes(windows.long())).hexdigest()[:_LENGTH]
