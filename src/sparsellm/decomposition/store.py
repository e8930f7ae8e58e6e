"""Where auxiliary variables live between iterations: in memory, or in memory-mapped files of a directory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class VariableStore:
    """(chunk, name) → tensor, kept in ``dtype``: on its own device, or in files under ``directory`` when that is given.

    Files are removed when the store is closed. fp32 keeps every digit; bf16 halves the space at three digits.
    fp16 overflows at 65504, which massive activations reach, so it is refused.
    """

    def __init__(self, directory: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"auxiliary variables are kept in float32 or bfloat16, not {dtype}")
        self._dtype = dtype
        self._held: dict[tuple[int, str], Tensor] = {}
        self._folder = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="variables-", dir=directory)

    def __enter__(self) -> VariableStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()  # unmaps the files before they are removed
        if self._folder is not None:
            self._folder.cleanup()

    def get(self, chunk: int, name: str, device: torch.device) -> Tensor | None:
        """A copy in fp32 on ``device``, or None where nothing was put yet."""
        held = self._held.get((chunk, name))
        return None if held is None else held.to(device, torch.float32)

    def put(self, chunk: int, name: str, value: Tensor) -> None:
        key = (chunk, name)
        if self._folder is None:
            self._held[key] = value.to(self._dtype)
            return
        if key not in self._held:
            path = str(Path(self._folder.name) / f"{chunk}.{name}")
            mapped = torch.from_file(path, shared=True, size=value.numel(), dtype=self._dtype)
            self._held[key] = mapped.view(value.shape)
        self._held[key].copy_(value)
