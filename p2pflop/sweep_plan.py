"""What a sweep is to buy, as a blob: all that another process needs to go on with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final, Self

from p2pflop.errors import ConfigError

if TYPE_CHECKING:
    from p2pflop.sdk import Number

SWEEP_VERSION: Final = 1


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is to buy, as the node keeps it in a blob of JSON.

    ``job`` is the address of the job file, ``args`` the arguments of each of its variants, ``data``
    the addresses of its inputs, by name, if they differ, too.
    """

    nonce: str
    job: str
    args: list[dict[str, Number]]
    max_nusd: int | None
    deadline_ns: int | None
    checkpoint_steps: int | None
    checkpoint_s: int | None
    classes: list[str]
    fresh: bool
    under_way: int
    room: int = 1
    """How many jobs are bought together, as one (``p2pflop.job.packing``)."""
    data: list[dict[str, str]] = field(default_factory=list)
    rest: bool = False

    def encode(self) -> bytes:
        """The blob."""
        return json.dumps({"sweep": SWEEP_VERSION, **asdict(self)}).encode()

    @classmethod
    def decode(cls, blob: bytes) -> Self:
        """The plan in a blob. Raises ConfigError if there is none."""
        try:
            fields = json.loads(blob)
            if fields.pop("sweep") != SWEEP_VERSION:
                raise ValueError
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError("that blob is not a sweep", hint="Give the id of a sweep.") from error
