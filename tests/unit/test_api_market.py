"""The tape over HTTP: from when, events from where, and numbers that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from .conftest import TOKEN

StartNode = Callable[..., Any]
HOUR_NS = 3600 * 10**9


@pytest.fixture
def http(start_node: StartNode) -> httpx.Client:
    node = start_node()
    hours = enumerate((9, 8, 7))
    node.service.traded = [
        {"id": f"{number:064x}", "class_id": "ab" * 32, "hour_ns": hour * HOUR_NS}
        for number, hour in hours
    ]
    return httpx.Client(base_url=node.url, headers={"authorization": f"Bearer {TOKEN}"})


def test_the_tape_is_listed_from_a_time_on(http: httpx.Client) -> None:
    told = http.get("/v1/trades").json()
    assert (told["total"], len(told["trades"])) == (3, 3)
    since = http.get("/v1/trades", params={"since_ns": str(8 * HOUR_NS)}).json()
    assert [each["hour_ns"] for each in since["trades"]] == [9 * HOUR_NS, 8 * HOUR_NS]


def test_events_go_on_after_the_last_one_seen(http: httpx.Client) -> None:
    path = "/v1/trades/events"
    told = http.get(path, params={"after": "1", "wait_ms": "50"})
    assert told.headers["content-type"].startswith("text/event-stream")
    assert told.text.count("event: trade\n") == 2
    assert "id: 2\n" in told.text
    resumed = http.get(path, params={"wait_ms": "50"}, headers={"last-event-id": "2"})
    assert resumed.text.count("event: trade\n") == 1


def test_the_market_has_classes_and_the_take_rate(http: httpx.Client) -> None:
    told = http.get("/v1/market").json()
    assert [each["class_id"] for each in told["classes"]] == ["ab" * 32]
    assert told["take"]["take_nusd"] == 0


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("/v1/trades", {"since_ns": "-1"}),
        ("/v1/trades", {"since_ns": "soon"}),
        ("/v1/trades/events", {"after": "1.5"}),
        ("/v1/trades/events", {"wait_ms": "9" * 19}),
    ],
)
def test_what_is_no_number_is_refused(
    http: httpx.Client, path: str, params: dict[str, str]
) -> None:
    told = http.get(path, params=params)
    assert told.status_code == 400
    assert "must be a whole number" in told.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/market", "/v1/trades", "/v1/trades/events"])
def test_only_the_user_may_ask(http: httpx.Client, path: str) -> None:
    assert http.get(path, headers={"authorization": "Bearer no"}).status_code == 401
