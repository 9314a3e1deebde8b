"""What a PFLOP costs who computes it: the price below which selling loses money."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from p2pflop.errors import ConfigError
from p2pflop.units import FLOP_PER_PFLOP, NS_PER_S, round_price

J_PER_KWH: Final = 3_600_000


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine costs and does.

    ``watts`` is what it draws at the wall while it computes, ``power_nusd`` the price of a kWh,
    ``hardware_nusd`` what it costs to buy, ``life_ns`` how long it will serve, ``busy_percent`` how
    much of that time it will be sold, ``flop_per_s`` its rate by the market's meter.
    """

    watts: int
    power_nusd: int
    hardware_nusd: int
    life_ns: int
    busy_percent: int
    flop_per_s: int


@dataclass(frozen=True, slots=True)
class CostPrice:
    """Nano-dollars a PFLOP, each part rounded up."""

    power_nusd: int
    hardware_nusd: int

    @property
    def total_nusd(self) -> int:
        """Below this every job sold makes the owner poorer."""
        return self.power_nusd + self.hardware_nusd

    @property
    def ask_nusd(self) -> int:
        """The lowest price that an ask can have and cover it: prices have three digits."""
        price = round_price(self.total_nusd)
        return price if price >= self.total_nusd else price + 10 ** (len(str(price)) - 3)


def cost_price(machine: Machine) -> CostPrice:
    """What a PFLOP costs on ``machine``. Raises ConfigError for what no machine is."""
    for what, value in (
        ("a rate", machine.flop_per_s),
        ("a life", machine.life_ns),
        ("a share of time that is sold", machine.busy_percent),
    ):
        if value <= 0:
            raise ConfigError(f"{what} of {value}", hint="It has to be more than zero.")
    if machine.busy_percent > 100:
        raise ConfigError(f"a machine that is sold {machine.busy_percent} % of the time")
    power = machine.watts * machine.power_nusd * FLOP_PER_PFLOP
    sold_ns = machine.life_ns * machine.busy_percent
    hardware = machine.hardware_nusd * FLOP_PER_PFLOP * NS_PER_S * 100
    return CostPrice(
        -(-power // (machine.flop_per_s * J_PER_KWH)),
        -(-hardware // (machine.flop_per_s * sold_ns)),
    )
