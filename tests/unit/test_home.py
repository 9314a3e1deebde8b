"""A home on a disk that is full, or that may not be written, is one clear error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from p2pflop.errors import ConfigError, P2PFlopError, StoreFullError
from p2pflop.node.home import open_home


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [(errno.ENOSPC, StoreFullError, "Free space"), (errno.EROFS, ConfigError, "--home")],
)
@pytest.mark.parametrize("call", ["open", "pwrite", "fsync"])
def test_what_the_disk_does_not_take(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    kind: type[P2PFlopError],
    hint: str,
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(kind, match=os.strerror(number)) as told, open_home(tmp_path / "home"):
        pytest.fail("it was opened")
    assert hint in told.value.hint


def test_a_home_is_opened_again_and_tells_who_holds_it(tmp_path: Path) -> None:
    with open_home(tmp_path) as home:
        account = home.account.public_key
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(P2PFlopError, match=f"process {os.getpid()}"), open_home(tmp_path):
            pytest.fail("it was opened twice")
    (tmp_path / "lock").write_text("9" * 30)
    with open_home(tmp_path) as home:
        assert home.account.public_key == account
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_node_that_ends_takes_down_no_note_but_its_own(tmp_path: Path) -> None:
    note = tmp_path / "node.json"
    with open_home(tmp_path) as home:
        home.write_note("http://127.0.0.1:1", "peer", embedded=False)
        assert note.exists()
    assert not note.exists()
    with open_home(tmp_path):
        note.write_text('{"pid": 1}')  # the home was deleted, and is another node's now
    assert note.read_text() == '{"pid": 1}'
