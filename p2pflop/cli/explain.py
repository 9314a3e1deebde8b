"""``p2pflop explain`` and ``audit-tape``: the decisions of buyers, ranked again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click

from p2pflop.cli.accounts import is_peer
from p2pflop.cli.output import (
    Flags,
    avoided_line,
    clean,
    common_options,
    print_json,
    say,
    short,
    table_lines,
)
from p2pflop.drafts import whole_file
from p2pflop.errors import ConfigError, ProtocolError
from p2pflop.keys import peer_id
from p2pflop.market.evidence import Evidence, Replay, Replayed, Verdict, replay
from p2pflop.market.ranking import Deal, Miss, MissReason
from p2pflop.market.records import session_prices, ticket_of
from p2pflop.units import counted, format_usd
from p2pflop.wire import decode

BAIT: Final = ", though its ask was firm: bait"


@click.command("explain")
@click.argument("run", metavar="ID|FILE")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the evidence here.")
@click.option("--provider", metavar="PEER", default="", help="Show only this provider.")
@common_options
@click.pass_obj
def explain_command(flags: Flags, run: str, out: Path | None, provider: str) -> None:
    """Show why a run went to its provider.

    The book that the buyer had is ranked again by the public rule, and compared with what was bid.
    Asks for the session of a script are ranked by what 0.1 PFLOP cost, one look for each lease.
    --out writes the evidence to a file, for anybody else to explain and audit: it names the
    providers, the class and the cost of the job, and not the job itself.

    \b
    Examples:
      p2pflop explain 5705a365685c
      p2pflop explain 5705a365685c --out decision.p2pe
      p2pflop explain decision.p2pe --provider 12D3KooW...
    """
    is_file = Path(run).exists()
    data = _read(Path(run)) if is_file else _evidence(flags, run)
    if out is not None:
        with whole_file(out) as file:
            file.write(data)
    replays = replay(_decode(data, run))
    if flags.json:
        print_json([_look_json(each, provider) for each in replays])
        return
    _print_looks(replays, provider)
    if not replays:
        say("nothing was bid for yet")
    if out is not None:
        say(f"evidence in {out}")


@click.command("audit-tape")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=Path)
@common_options
@click.pass_obj
def audit_tape_command(flags: Flags, files: tuple[Path, ...]) -> None:
    """Find fills that were not the best deal.

    Each file is the evidence of a run, as 'explain --out' writes it. Sheets, bids and answers are
    checked for their signatures and ranked again. The exit code is 11 if one is wrong. A bid is
    unproven if sheets of its book are missing from the file.

    \b
    Examples:
      p2pflop audit-tape decisions/*.p2pe
    """
    bids = [
        (path, replayed)
        for path in files
        for each in replay(_decode(_read(path), str(path)))
        for replayed in each.bids
    ]
    wrong = [(path, replayed) for path, replayed in bids if not replayed.verdict.is_right]
    if flags.json:
        print_json([{"file": str(path), **_bid_json(replayed)} for path, replayed in bids])
    else:
        for path, replayed in wrong:
            say(f"{path}: {_who(replayed)}: {replayed.verdict}")
        for path, replayed in bids:
            if replayed.is_bait:
                say(f"{path}: {_who(replayed)} was refused{BAIT}")
        unproven = sum(replayed.verdict is Verdict.UNPROVEN for _, replayed in bids)
        say(
            f"{counted(len(bids), 'bid')} in {counted(len(files), 'file')}, "
            f"{len(wrong)} against the rule"
            + (f", {unproven} unproven: not all of the book was kept" if unproven else "")
        )
    if wrong:
        raise ProtocolError(
            f"{len(wrong)} of {counted(len(bids), 'bid')} not for the best deal",
            hint="See them with 'p2pflop explain FILE'.",
        )


def _evidence(flags: Flags, run: str) -> bytes:
    try:
        return flags.client(start=True).evidence(run)
    except ConfigError as error:
        raise ConfigError(
            error.message,
            hint="See p2pflop jobs. Who sold, or did not, asks the buyer for a file: "
            "'p2pflop explain ID --out FILE'.",
        ) from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(Evidence.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            hint="Write one with 'p2pflop explain ID --out FILE'.",
        ) from error


def _decode(data: bytes, name: str) -> Evidence:
    if len(data) > Evidence.MAX_BYTES:
        raise ConfigError(f"{name} is over {Evidence.MAX_BYTES} bytes")
    try:
        return decode(Evidence, data)
    except ProtocolError as error:
        raise ConfigError(
            f"{clean(name)} is no evidence, or damaged: {error.message}",
            hint="Write one with 'p2pflop explain ID --out FILE'.",
        ) from error


def _print_looks(looks: Sequence[Replay], provider: str) -> None:
    """Each look; those in a row that led to no bid and found the same are told once."""
    number = 1
    for lines, alike in itertools.groupby(looks, lambda look: _look_lines(look, provider)):
        group = list(alike)
        last = number + len(group) - 1
        if len(looks) > 1:
            say(f"look {number} at the book" if number == last else f"looks {number} to {last}")
        number = last + 1
        for line in lines:
            click.echo(line)
        for replayed in group[-1].bids:
            mark = "right" if replayed.verdict.is_right else "WRONG"
            say(f"{_who(replayed)}: {mark}: {replayed.verdict}")
        if not group[-1].bids:
            say("nothing was bid for: no ask did")


def _look_lines(look: Replay, provider: str) -> list[str]:
    lines = table_lines(
        ("PROVIDER", "TOTAL", "PRICE/PFLOP", "OUTCOME"),
        (
            (
                short(entry.peer),
                format_usd(entry.total_nusd),
                format_usd(entry.ask.price_nusd),
                clean(outcome),
            )
            for entry, outcome in _outcomes(look)
            if is_peer(entry.peer, provider)
        ),
    )
    nothing = "No ask of that provider was ranked." if provider else "The book was empty."
    return lines or [nothing]


def _outcomes(look: Replay) -> Iterator[tuple[Deal | Miss, str]]:
    """Each ask, best first, and what came of it."""
    bids = {
        (each.bid.provider, each.bid.ask, ticket_of(each.bid)): each
        for each in look.bids
        if each.bid is not None
    }
    for entry in look.ranked:
        if isinstance(entry, Miss):
            yield entry, f"does not do: {_reason(entry, look)}"
            continue
        replayed = bids.get((entry.node, entry.ask.number, entry.ticket))
        if replayed is None:
            yield entry, "not asked: another was better"
        elif replayed.filled:
            yield (
                entry,
                f"took the {_what(replayed)}"
                + (f", then: {replayed.reason}" if replayed.reason else ""),
            )
        else:
            yield entry, (replayed.reason or "asked") + (BAIT if replayed.is_bait else "")


def _what(replayed: Replayed) -> str:
    is_session = replayed.bid is not None and session_prices(replayed.bid) is not None
    return "session" if is_session else "job"


def _reason(miss: Miss, look: Replay) -> str:
    avoided = look.avoided.get(miss.account)
    if avoided is None or miss.reason is not MissReason.POLICY:
        return miss.told
    return avoided_line(avoided.until_ns, avoided.failures)


def _who(replayed: Replayed) -> str:
    if replayed.bid is None:
        return "a bid"
    return f"the bid to {short(peer_id(replayed.bid.provider))}"


def _bid_json(replayed: Replayed) -> dict[str, Any]:
    bid = replayed.bid
    return {
        "provider": "" if bid is None else peer_id(bid.provider),
        "quote_nusd": 0 if bid is None else bid.quote_nusd,
        "place": replayed.place,
        "filled": replayed.filled,
        "reason": replayed.reason,
        "verdict": replayed.verdict.value,
        "right": replayed.verdict.is_right,
        "bait": replayed.is_bait,
    }


def _look_json(look: Replay, provider: str) -> dict[str, Any]:
    return {
        "ranked": [
            {
                "provider": entry.peer,
                "account": entry.account.hex(),
                "ask": entry.ask.number,
                "total_nusd": entry.total_nusd,
                "price_nusd": entry.ask.price_nusd,
                "outcome": outcome,
            }
            for entry, outcome in _outcomes(look)
            if is_peer(entry.peer, provider)
        ],
        "bids": [_bid_json(replayed) for replayed in look.bids],
    }
