"""What this buyer has seen of providers, for its policy: whoever failed is avoided for a while.

Each failure doubles the pause, a job that was done forgives all. Who hands a job over because its
operator stops it has not failed, and neither has a stranger that another was asked instead of
before it said a word, unless it does so again with no job done in between: each time costs the
buyer a start elsewhere. It is this node's own experience, audited by nobody, and it is
part of the policy that each bid commits to.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from p2pflop.market.evidence import Avoided
from p2pflop.market.ranking import MAX_POLICY_ACCOUNTS
from p2pflop.units import NS_PER_S

FIRST_PAUSE_NS: Final = 60 * NS_PER_S
MAX_PAUSE_NS: Final = 24 * 3600 * NS_PER_S
MAX_FAILED: Final = MAX_POLICY_ACCOUNTS


class Experience:
    """``own_account`` is never avoided: there is nobody else to turn to."""

    def __init__(self, own_account: bytes) -> None:
        self._own_account = own_account
        self._failed: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._excused: OrderedDict[bytes, None] = OrderedDict()

    def note_failure(self, account: bytes, at_ns: int) -> None:
        """A provider took a job and did not do it."""
        if account == self._own_account:
            return
        failures, _ = self._failed.pop(account, (0, 0))
        pause_ns = min(FIRST_PAUSE_NS << min(failures, 16), MAX_PAUSE_NS)
        self._failed[account] = (failures + 1, at_ns + pause_ns)
        if len(self._failed) > MAX_FAILED:
            self._failed.popitem(last=False)

    def note_excused(self, account: bytes, at_ns: int) -> None:
        """A provider had to stop, and brought what it had computed first; or it was slow to say its
        first word."""
        if account in self._excused:
            self.note_failure(account, at_ns)
        self._excused[account] = None
        if len(self._excused) > MAX_FAILED:
            self._excused.popitem(last=False)

    def note_success(self, account: bytes) -> None:
        """A provider did a job."""
        self._failed.pop(account, None)
        self._excused.pop(account, None)

    def avoided(self, now_ns: int) -> tuple[bytes, ...]:
        """The accounts that are to be left alone now, sorted."""
        return tuple(each.account for each in self.pauses(now_ns))

    def pauses(self, now_ns: int) -> tuple[Avoided, ...]:
        """Who is to be left alone now, until when and why, sorted by account."""
        return tuple(
            Avoided(account, failures, until_ns)
            for account, (failures, until_ns) in sorted(self._failed.items())
            if until_ns > now_ns
        )
