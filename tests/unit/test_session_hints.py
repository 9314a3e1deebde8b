"""What a script is told that gets no lease: one line, in its own settings, never in a job's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from p2pflop.errors import ConfigError, P2PFlopError
from p2pflop.job.commands import Open
from p2pflop.market.credit import credit_reason
from p2pflop.market.ranking import Miss, MissReason, Need
from p2pflop.market.samples import ask, party
from p2pflop.node.execute import WORKER_BASE_BYTES
from p2pflop.node.session_hints import no_lease, refused_everywhere, unknown_class
from p2pflop.units import GIB, MIB
from tests.session_scripts import opening

WISH: Open = opening(memory_bytes=2 * GIB)
NEED = Need(frozenset(), 0, 0, 0, 2 * GIB + WORKER_BASE_BYTES, 1, 1, bytes(16))


def misses(reason: MissReason, memory_bytes: int = 64 * GIB, total_nusd: int = 5) -> list[Miss]:
    """Two of them."""
    asks = [ask(memory_bytes=memory_bytes), ask(memory_bytes=memory_bytes // 2)]
    return [Miss(party(1).sheet(each), each, reason, total_nusd, NEED) for each in asks]


def hint(found: Sequence[Miss], left_nusd: int = 3) -> str:
    return no_lease(found, WISH, left_nusd).hint


@pytest.mark.parametrize("reason", [each for each in MissReason if each is not MissReason.MEMORY])
def test_every_reason_has_a_hint_of_one_line_without_words_for_jobs(reason: MissReason) -> None:
    error = no_lease(misses(reason), WISH, 3)
    assert error.hint
    for words in (error.message, error.hint):
        assert "\n" not in words
        assert "job" not in words
        assert "--class" not in words


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "CLOUD_WAIT"),
        (misses(MissReason.CLASS), "CLOUD_CLASS=any"),
        (misses(MissReason.BUDGET), "CLOUD_MAX_USD"),
        (misses(MissReason.EXPIRED), "CLOUD_WAIT"),
        (misses(MissReason.POLICY), "CLOUD_FALLBACK=local"),
        (misses(MissReason.MEMORY, GIB + WORKER_BASE_BYTES), "CLOUD_MEMORY=1024MiB"),
        (misses(MissReason.MEMORY, MIB), "connect to a peer with more memory"),
    ],
    ids=["no ask", "class", "cap", "expired", "failed lately", "memory", "no memory at all"],
)
def test_a_hint_names_the_setting(found: list[Miss], words: str) -> None:
    assert words in hint(found)


def test_asks_of_another_class_that_are_too_small_as_well_are_told_as_both() -> None:
    told = hint(misses(MissReason.CLASS, GIB + WORKER_BASE_BYTES))
    assert "CLOUD_CLASS=any" in told
    assert "CLOUD_MEMORY=1024MiB" in told


def test_what_is_left_of_the_limit_is_told_with_what_it_takes() -> None:
    error = no_lease(misses(MissReason.BUDGET, total_nusd=2_000_000), WISH, 1_000_000)
    assert "$0.001 are left" in error.message
    assert "$0.002 at least" in error.message


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("busy: every slot is taken", "CLOUD_WAIT"),
        ("busy: too little memory is free", "CLOUD_MEMORY to less than 2.15 GB"),
        (credit_reason(5, 0, 10, 0), "p2pflop ledger"),
        (credit_reason(5, 3, 10, 0), "CLOUD_MAX_USD to less"),
    ],
)
def test_a_refusal_is_told_with_its_reason(reason: str, words: str) -> None:
    error: P2PFlopError = refused_everywhere(reason, WISH)
    assert reason in error.message
    assert words in error.hint


def test_a_class_that_is_not_to_be_had_here_has_a_remedy() -> None:
    error = unknown_class(ConfigError("the device CUDA does not work here: no driver"))
    assert error.message.startswith("CLOUD_CLASS: the device CUDA")
    assert "CLOUD_CLASS=any" in error.hint
