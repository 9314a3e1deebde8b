"""What a node does before anything else."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

from p2pflop.node.config import load_settings
from p2pflop.node.main import MAX_OPEN_FILES, _allow_open_files, _set_up_logging


def test_no_line_in_the_log_for_every_question_to_a_registry(tmp_path: Path) -> None:
    root, http = logging.getLogger(), logging.getLogger("httpx")
    handlers, levels = root.handlers[:], (root.level, http.level)
    root.handlers.clear()  # Else they are closed.
    try:
        _set_up_logging(load_settings({"home": tmp_path}))
        assert not http.isEnabledFor(logging.INFO)
        assert logging.getLogger("p2pflop.node").isEnabledFor(logging.INFO)
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        http.setLevel(levels[1])


def test_as_many_open_files_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        _allow_open_files()
        raised, same = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert same == hard
        assert raised == (MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, 65_536))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
