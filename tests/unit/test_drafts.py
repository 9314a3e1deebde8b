"""What is written to a user's file is there whole or not at all, and replaces nothing but files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from p2pflop.drafts import whole_file
from p2pflop.errors import ConfigError, StoreFullError


def write(path: Path, fault: Exception) -> None:
    with whole_file(path) as file:
        file.write(b"new")
        raise fault


def test_a_file_appears_whole_and_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_on_the_way_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        write(path, RuntimeError())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_as_such_and_leaves_no_file(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StoreFullError, match="No space left") as told:
        write(tmp_path / "out", full)
    assert "Free space" in told.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with whole_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is a folder"),
        ("pipe", "no regular file"),
        ("to the pipe", "no regular file"),
        ("absent/out", "there is no folder"),
    ],
)
def test_what_is_no_place_for_a_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to the pipe").symlink_to(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=message), whole_file(tmp_path / name):
        pytest.fail("it was opened")
    assert (tmp_path / "pipe").is_fifo()
    assert not (tmp_path / "absent").exists()
