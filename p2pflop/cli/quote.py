"""``p2pflop quote``: what a PFLOP costs on a machine, and where an ask at that would stand."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any, Final

import click

from p2pflop.cli.output import Flags, common_options, print_fields, print_json, say
from p2pflop.errors import NodeUnreachableError
from p2pflop.market.pricing import Machine, cost_price
from p2pflop.units import counted, format_flop, format_usd, parse_duration, parse_flop, parse_usd

MEASURED_STEPS: Final = 60
MATRIX: Final = 512
MAX_WATTS: Final = 10**6


@click.command("quote")
@click.option("--power-price", metavar="USD", required=True, help="What a kWh costs.")
@click.option(
    "--watts",
    type=click.IntRange(0, MAX_WATTS),
    metavar="N",
    required=True,
    help="What the machine draws at the wall while it computes.",
)
@click.option("--hardware-cost", metavar="USD", default="0", help="What it cost [default: 0].")
@click.option(
    "--life", metavar="TIME", default="1095d", help="How long it serves [default: 3 years]."
)
@click.option(
    "--busy",
    type=click.IntRange(1, 100),
    metavar="PERCENT",
    default=50,
    help="How much of that time is sold [default: 50].",
)
@click.option(
    "--flop-rate", metavar="RATE", help="FLOP a second, like 35G or 80T; else measured here."
)
@common_options
@click.pass_obj
def quote_command(
    flags: Flags,
    power_price: str,
    watts: int,
    hardware_cost: str,
    life: str,
    busy: int,
    flop_rate: str | None,
) -> None:
    """Tell what a PFLOP costs you, and what to ask for it.

    Power and hardware, by the market's meter. Without --flop-rate a few products of matrices are
    run in one worker of this machine. If a node runs, its book tells where that price would stand.

    \b
    Examples:
      p2pflop quote --power-price 0.30 --watts 350 --hardware-cost 1600 --flop-rate 40T
      p2pflop quote --power-price 0.12 --watts 65
    """
    machine = Machine(
        watts,
        parse_usd(power_price),
        parse_usd(hardware_cost),
        parse_duration(life),
        busy,
        measured_rate() if flop_rate is None else parse_flop(flop_rate),
    )
    cost = cost_price(machine)
    below, asks = _standing(flags, cost.ask_nusd)
    if flags.json:
        print_json(
            {
                "flop_per_s": machine.flop_per_s,
                "power_nusd": cost.power_nusd,
                "hardware_nusd": cost.hardware_nusd,
                "cost_nusd": cost.total_nusd,
                "ask_nusd": cost.ask_nusd,
                "asks": asks,
                "cheaper_asks": below,
            }
        )
        return
    print_fields(
        (
            (
                "rate",
                f"{format_flop(machine.flop_per_s)}/s{'' if flop_rate else ' (measured here)'}",
            ),
            ("power a PFLOP", format_usd(cost.power_nusd)),
            ("hardware a PFLOP", f"{format_usd(cost.hardware_nusd)}, if sold {busy} % of the time"),
            ("cost a PFLOP", format_usd(cost.total_nusd)),
            ("in the book", _told(below, asks)),
        )
    )
    say(f"sell at cost: p2pflop node --ask {format_usd(cost.ask_nusd).removeprefix('$')}")


def measured_rate() -> int:
    """FLOP a second of one worker here, by the meter: products of matrices, the median step."""
    from tinygrad import Tensor

    import p2pflop as pf

    state = Tensor.rand(MATRIX, MATRIX)

    def step() -> dict[str, Any]:
        state.assign((state @ state) / MATRIX)
        return {"mean": state.mean()}

    say("measuring: a few seconds")
    job = pf.trace(step, steps=MEASURED_STEPS, title="rate")
    told_at: list[float] = []
    job.run_local(lambda _row: told_at.append(time.perf_counter()))
    took_s = statistics.median(b - a for a, b in pairwise(told_at))
    [line] = [line for line in job.cost.lines if line.times == MEASURED_STEPS]
    return int(line.flop / took_s)


def _standing(flags: Flags, price_nusd: int) -> tuple[int, int]:
    """How many asks of how many in the book are cheaper; none if no node runs."""
    try:
        asks = flags.client().book()
    except NodeUnreachableError:
        return 0, 0
    return sum(int(ask["price_nusd"]) < price_nusd for ask in asks), len(asks)


def _told(below: int, asks: int) -> str:
    if not asks:
        return "no asks known here: run a node, then p2pflop book"
    return f"{below} of {counted(asks, 'ask')} are cheaper"
