"""Files that get their name when they are complete."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from sparsellm.errors import StorageError
from sparsellm.files.files import create_atomically


@pytest.fixture(params=["hard links", "no hard links"], autouse=True)
def file_system(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose files have a single name, such as FAT, fails every link."""
    if request.param == "no hard links":
        refused = OSError(errno.EPERM, os.strerror(errno.EPERM))
        monkeypatch.setattr(os, "link", Mock(side_effect=refused))


def test_a_free_name_is_taken(tmp_path: Path) -> None:
    created = create_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert created == 3
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["file", "broken link", "directory"])
def test_what_has_the_name_by_then_stays(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "a"

    def appears(_: object) -> None:
        if kind == "file":
            place.write_bytes(b"mine")
        elif kind == "directory":
            place.mkdir()
        else:
            place.symlink_to(tmp_path / "nowhere")

    with pytest.raises(StorageError, match=r"appeared while .* name another file"):
        create_atomically(place, appears)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert place.is_dir() == (kind == "directory")
    assert place.is_symlink() == (kind == "broken link")
    assert kind != "file" or place.read_bytes() == b"mine"
