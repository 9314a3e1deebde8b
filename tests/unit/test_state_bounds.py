"""No state of a lifecycle lasts forever, whatever the other side says or does not say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pflop.job.buying import Buying, buyer
from p2pflop.job.events import DEADLINE, ENDS, Alive, Event, Lost, SetTimer, State, Timer
from p2pflop.job.lifecycle import (
    BUYER,
    BUYER_LIMITS,
    DELIVERY,
    PROVIDER,
    PROVIDER_LIMITS,
    STALL,
    UNTIL_DEADLINE,
    Lifecycle,
)
from p2pflop.job.selling import Selling
from p2pflop.market.samples import DEADLINE_NS, NOW_NS, buyer_desk, party
from p2pflop.units import NS_PER_S
from tests.unit.test_lifecycle_states import pair

Life = Lifecycle[Buying] | Lifecycle[Selling]
STATES = [
    *(("buyer", state) for state in sorted(set(BUYER) - ENDS)),
    *(("provider", state) for state in sorted(set(PROVIDER) - ENDS)),
]
HOUR_NS = 3600 * NS_PER_S


def brought_to(side: str, state: State) -> Life:
    if state is State.RANKING:
        return buyer(buyer_desk(party(0), []), DEADLINE_NS)
    life: Life = getattr(pair(state), side)
    assert life.state is state
    return life


def timers(side: str, state: State) -> dict[str, int]:
    """Those that run in that state: what a restart there sets again."""
    life = brought_to(side, state)
    return {a.name: a.at_ns for a in life._arm(NOW_NS) if isinstance(a, SetTimer)}


@pytest.mark.parametrize(("side", "state"), STATES)
def test_every_state_has_its_timers(side: str, state: State) -> None:
    limits = BUYER_LIMITS if side == "buyer" else PROVIDER_LIMITS
    running = timers(side, state)
    limit = limits[state]
    assert running[limit.name] <= NOW_NS + limit.after_ns
    assert (running.get(DEADLINE) == DEADLINE_NS) == (state in UNTIL_DEADLINE)
    if (side, state) == ("buyer", State.RUNNING):
        assert running[STALL.name] == NOW_NS + STALL.after_ns
    if state is State.VERIFYING:
        assert running[DELIVERY.name] == NOW_NS + DELIVERY.after_ns


@pytest.mark.parametrize(("side", "state"), STATES)
@pytest.mark.parametrize(
    "says",
    [lambda: None, lambda: Alive(worked=True), lambda: Lost("the stream broke")],
    ids=["silence", "signs of life", "losses"],
)
def test_nobody_keeps_a_state_for_longer_than_its_bound(
    side: str, state: State, says: Callable[[], Event | None]
) -> None:
    life = brought_to(side, state)
    due = life._arm(NOW_NS)
    bound_ns = max(DEADLINE_NS, NOW_NS + HOUR_NS)
    if state not in UNTIL_DEADLINE:
        bound_ns = NOW_NS + (BUYER_LIMITS if side == "buyer" else PROVIDER_LIMITS)[state].after_ns
    now_ns = NOW_NS
    while life.state is state and now_ns <= bound_ns:
        now_ns += NS_PER_S
        said = says()
        names = [action.name for action in due if isinstance(action, SetTimer)]
        for event in [*([said] if said else []), *map(Timer, names)]:
            if life.state is state:
                due = life.on(event, now_ns) or due
    assert life.state is not state
    assert now_ns <= bound_ns


def test_the_bounds_are_those_in_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "design.md").read_text("utf-8")
    rows = re.findall(r"^\| (buyer|provider) \| `(\w+)` \| ([\d,]+) s \|", text, re.MULTILINE)
    told = {(side, State(state)): int(s.replace(",", "")) for side, state, s in rows}
    limits = {"buyer": BUYER_LIMITS, "provider": PROVIDER_LIMITS}
    assert told == {key: limits[key[0]][key[1]].after_ns // NS_PER_S for key in STATES}


@pytest.mark.parametrize("state", [State.BIDDING, State.CONFIRMING, State.RUNNING])
def test_that_a_bid_was_not_answered_says_nothing_of_one_that_is(state: State) -> None:
    """The answer may come while that is on its way through the driver."""
    made = pair(state).buyer
    attempt = made.side.attempt
    assert made.on(Lost("passed over: too slow", attempt + 1), NOW_NS) == []
    assert made.state is state
    made.on(Lost("passed over: too slow", attempt), NOW_NS)
    if state is State.BIDDING:
        assert made.state in (State.WAITING, State.BIDDING)
        assert made.side.attempt == attempt + 1
        assert "passed over" in made.side.outcome()[0]
    else:
        assert made.state is state
