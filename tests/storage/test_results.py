"""Records of measurements that end at the same time."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sparsellm.records import Continuation
from sparsellm.storage import files, results
from sparsellm.storage.results import append_result, read_results


@pytest.mark.skipif(files.fcntl is None, reason="there are no locks")
def test_records_that_are_appended_at_once_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def read(directory: Path) -> Any:
        found = read_results(directory)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # for the other one, which would read the same
        return found

    monkeypatch.setattr(results, "read_results", read)
    records = [Continuation(prompt=each, dense="", pruned="") for each in ("one", "other")]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda record: append_result(tmp_path, record), records))
    kept = read_results(tmp_path).continuations
    assert {record.prompt for record in kept} == {"one", "other"}
