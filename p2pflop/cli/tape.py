"""``p2pflop trades``, and what ``p2pflop book`` shows of classes and watches."""

from __future__ import annotations

import functools
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import click

from p2pflop.cli.output import (
    Flags,
    clean,
    common_options,
    print_json,
    print_table,
    short,
    table_lines,
)
from p2pflop.cli.statement import parse_date
from p2pflop.job.spec import class_id
from p2pflop.kernels.classes import descriptor, name_of
from p2pflop.market.limits import label_words
from p2pflop.units import NS_PER_S, counted, format_bytes, format_flop, format_usd

if TYPE_CHECKING:
    from p2pflop.client import Client

WATCH_S: Final = 2.0
FLOP_PER_GFLOP: Final = 10**9
MAX_SEEN: Final = 16_384
_CLASS_DIGITS: Final = re.compile(r"[0-9a-f]{8,64}")
_ASK_FIELDS: Final = (
    "provider",
    "ask",
    "class_id",
    "price_nusd",
    "setup_nusd",
    "min_charge_nusd",
    "byte_price_nusd",
    "memory_bytes",
)
"""What makes an ask another one to who watches, beside its limits; that its sheet was issued anew
does not."""

TRADE_HEADER: Final = ("HOUR (UTC)", "SELLER", "PRICE/PFLOP", "SIZE", "CLASS")
ASK_HEADER: Final = ("PROVIDER", "PRICE/PFLOP", "MEMORY", "CLAIMED SPEED", "CLASS", "AT MOST")
CLASS_HEADER: Final = (
    "CLASS",
    "LAST PRICE",
    "LOWEST",
    "HIGHEST",
    "THIS HOUR",
    "IN A DAY",
    "TRADES OF SELLERS",
    "ASKS OF ACCOUNTS",
)

Json = dict[str, Any]


@click.command("trades")
@click.option("--class", "class_", metavar="CLASS", help="Only of this class: its name or id.")
@click.option("--since", metavar="DATE", help="From then on: 2026-11-01, or with a time; UTC.")
@click.option("--watch", is_flag=True, help="Go on with new trades as they come, until Ctrl-C.")
@common_options
@click.pass_obj
def trades_command(flags: Flags, class_: str | None, since: str | None, watch: bool) -> None:
    """Show what was traded.

    Every settled sale that this node has heard of in 72 hours, newest hour first: the word of its
    seller, never with the buyer. Sizes are rounded to one digit; prices are dollars a PFLOP.

    \b
    Examples:
      p2pflop trades
      p2pflop trades --class cpu-clang-nofma --since 2026-11-01T12:00
      p2pflop trades --watch --json | jq -c '[.hour_ns, .price_nusd, .gflop]'
    """
    wanted = class_filter(class_)
    client = flags.client()
    since_ns = 0 if since is None else parse_date(since)
    trades = [each for each in client.trades(since_ns) if wanted(each["class_id"])]
    if flags.json and not watch:
        print_json(trades)
    elif not watch:
        empty = "No trades known: nobody has told one, or no peer is connected."
        print_table(TRADE_HEADER, map(_trade_row, trades), empty)
    else:
        with suppress(KeyboardInterrupt):
            for each in _followed(client, trades):
                if wanted(each["class_id"]):
                    _print_change(flags, each, _trade_row(each))


def watch_book(flags: Flags, client: Client, show: Callable[[], list[str]]) -> None:
    """Show the book until Ctrl-C: in place on a terminal, else a line a change.

    ``show`` gives what the book looks like now.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    with suppress(KeyboardInterrupt):
        if flags.json or not console.is_terminal:
            for change, ask in ask_changes(client.book):
                _print_change(flags, {"change": change, **ask}, (change, *ask_row(ask)))
        else:
            with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
                while True:
                    live.update(Text("\n".join(show())), refresh=True)
                    time.sleep(WATCH_S)


def ask_changes(book: Callable[[], list[Json]]) -> Iterator[tuple[str, Json]]:
    """``("new", ask)`` and ``("gone", ask)``, as ``book`` changes; first all that there are."""
    before: dict[tuple[object, ...], Json] = {}
    while True:
        now = {_identity(ask): ask for ask in book()}
        yield from (("gone", ask) for key, ask in before.items() if key not in now)
        yield from (("new", ask) for key, ask in now.items() if key not in before)
        before = now
        time.sleep(WATCH_S)


def _identity(ask: Json) -> tuple[object, ...]:
    """Two asks with the same one are the same to who watches."""
    limits = tuple(sorted(ask.get("limits", {}).items()))
    return (*(ask.get(field) for field in _ASK_FIELDS), limits)


def ask_row(ask: Json) -> tuple[str, ...]:
    """An ask in the columns of ``ASK_HEADER``."""
    return (
        f"{short(ask['provider'])}{' (this node)' if ask.get('own') else ''}",
        format_usd(int(ask["price_nusd"])),
        format_bytes(int(ask["memory_bytes"])),
        f"{format_flop(int(ask.get('flop_per_s', 0)))}/s",
        class_label(ask["class_id"]),
        label_words(ask.get("limits", {})),
    )


def ask_lines(asks: Sequence[Json]) -> list[str]:
    """The asks as a table, with the column of their limits if there are any."""
    rows = [ask_row(ask) for ask in asks]
    columns = len(ASK_HEADER) if any(row[-1] for row in rows) else len(ASK_HEADER) - 1
    return table_lines(ASK_HEADER[:columns], (row[:columns] for row in rows))


def class_lines(market: Json) -> list[str]:
    """A line for each class: prices and volume of the tape, and the depth of the book."""
    rows = [
        (
            class_label(each["class_id"]),
            _price(each.get("last_nusd")),
            _price(each.get("low_nusd")),
            _price(each.get("high_nusd")),
            format_flop(int(each.get("hour_gflop", 0)) * FLOP_PER_GFLOP),
            format_flop(int(each.get("day_gflop", 0)) * FLOP_PER_GFLOP),
            f"{int(each.get('day_trades', 0))} of {int(each.get('day_accounts', 0))}",
            f"{int(each.get('asks', 0))} of {int(each.get('accounts', 0))}",
        )
        for each in market["classes"]
    ]
    return table_lines(CLASS_HEADER, rows)


def depth_lines(market: Json) -> list[str]:
    """Under each class how many asks there are at or below each price, and of how many accounts."""
    lines: list[str] = []
    for each in market["classes"]:
        levels = each.get("depth", ())
        rows = [
            (_price(level["price_nusd"]), str(int(level["asks"])), str(int(level["accounts"])))
            for level in levels
        ]
        table = table_lines(("PRICE/PFLOP", "ASKS UP TO IT", "ACCOUNTS"), rows)
        lines += ["", f"depth of {class_label(each['class_id'])}", *(table or ["nothing asked"])]
        hidden = int(each.get("asks", 0)) - (int(levels[-1]["asks"]) if levels else 0)
        lines += [f"... and {counted(hidden, 'ask')} above"] if hidden > 0 else []
    return lines


def take_line(take: Json) -> str:
    """The take rate, and what it is reckoned from."""
    taken, paid, fills = (int(take[key]) for key in ("take_nusd", "paid_nusd", "fills"))
    share = f"{Decimal(100 * taken) / paid:.3g} %" if paid else "none paid"
    return (
        f"take rate: {format_usd(taken)} ({share}) of {format_usd(paid)} that buyers paid in "
        f"{counted(fills, 'purchase or sale', 'purchases and sales')} of this account, "
        "by its ledger and the signed receipts"
    )


def class_filter(text: str | None) -> Callable[[str], bool]:
    """Whether an id in hex is of the class that a person names. Raises ConfigError."""
    if text is None:
        return lambda _: True
    if _CLASS_DIGITS.fullmatch(text):
        return lambda found: found.startswith(text)
    wanted = class_id(descriptor(text)).hex()
    return lambda found: found == wanted


@functools.cache
def class_label(hexadecimal: str) -> str:
    """The name of a class on this machine, else the first digits of its id."""
    return name_of(bytes.fromhex(hexadecimal)) or short(hexadecimal)


def _followed(client: Client, trades: list[Json]) -> Iterator[Json]:
    """Those, the oldest hour first, and then what is new."""
    seen = deque((each["id"] for each in trades), maxlen=MAX_SEEN)
    known = set(seen)
    yield from reversed(trades)
    for each in client.trade_events():
        if each["id"] not in known:
            if len(seen) == MAX_SEEN:
                known.discard(seen[0])
            seen.append(each["id"])
            known.add(each["id"])
            yield each


def _print_change(flags: Flags, told: Json, row: Iterable[str]) -> None:
    if flags.json:
        print_json(told)
    else:
        click.echo("  ".join(clean(cell) for cell in row).rstrip())


def _trade_row(trade: Json) -> tuple[str, ...]:
    hour = datetime.fromtimestamp(int(trade["hour_ns"]) // NS_PER_S, UTC)
    return (
        f"{hour:%Y-%m-%d %H}h",
        f"{short(trade['provider'])}{' (this node)' if trade.get('own') else ''}",
        format_usd(int(trade["price_nusd"])),
        format_flop(int(trade["gflop"]) * FLOP_PER_GFLOP),
        class_label(trade["class_id"]),
    )


def _price(nusd: int | None) -> str:
    return "" if nusd is None else format_usd(int(nusd))
