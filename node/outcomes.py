"""How a run or a sale has ended, in the words that its buyer is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pflop.errors import (
    JobError,
    MarketError,
    P2PFlopError,
    ProviderError,
    StoreError,
    StoreFullError,
)
from p2pflop.job.buying import GAVE_BACK, JOB_FAULT_PREFIX
from p2pflop.job.events import Blame, Finish
from p2pflop.job.graph import Dtype
from p2pflop.job.naming import output_names
from p2pflop.job.results import result_hash
from p2pflop.job.spec import ROLE_STATE, Result
from p2pflop.node.orders import Order
from p2pflop.node.printable import printable
from p2pflop.node.runs import Run
from p2pflop.units import NS_PER_S


def describe_result(order: Order, result: Result, cost_nusd: int) -> dict[str, Any]:
    """The fields of a ``result`` event, but for the provider."""
    labels, work = order.file.labels, order.checked.work
    names = output_names(labels)
    slots = [slot for slot, param in enumerate(work.params) if param.role == ROLE_STATE]
    return {
        "hash": result_hash(result).hex(),
        "outputs": {
            names[output.phase][output.output]: output.address.hex() for output in result.outputs
        },
        "state": {
            labels.params[slot]: {
                "address": address.hex(),
                "dtype": Dtype(work.params[slot].dtype).name.lower(),
                "shape": list(work.params[slot].shape),
            }
            for slot, address in zip(slots, result.state, strict=True)
        },
        "trace": result.trace.hex(),
        "steps_done": result.steps_done,
        "cost_nusd": cost_nusd,
        "cost_usd": cost_nusd / NS_PER_S,
    }


def error_of(action: Finish) -> P2PFlopError:
    """What a run fails with whose lifecycle has ended so."""
    reason = printable(action.reason)
    match action.blame:
        case Blame.JOB:
            reason = reason.replace(GAVE_BACK + JOB_FAULT_PREFIX, "the job failed: ", 1)
            return JobError(reason, hint="Change the job, then submit it again.")
        case Blame.MARKET:
            hint = "See p2pflop book, and p2pflop submit FILE --quote."
            return MarketError(reason, hint=hint)
        case _:
            return ProviderError(reason, hint="Nothing more is owed. Submit it again.")


def what_is_left(run: Run, knows: Callable[[int], bool], class_id: str = "") -> str:
    """How to go on from the last checkpoint of a run that failed; nothing if it has none.

    ``knows`` tells whether the state after a step can be found again; ``class_id`` is that of a
    run in another class than this node's own.
    """
    steps = [event["step"] for event in reversed(run.events) if event["kind"] == "checkpoint"]
    if run.card["first_step"]:
        steps.append(run.card["first_step"])  # where it began itself
    step = next(filter(knows, steps), None)
    if step is None:
        return ""
    return (
        f"The checkpoint after step {step} is here: job.resume({step}), or p2pflop submit FILE "
        f"--from-step {step}{class_id and ' --class ' + class_id}, goes on from there."
    )


def fault_told(error: JobError) -> str:
    """What is told of a job's own fault, and what to do about it."""
    return f"{error.message}. {error.hint}" if error.hint else error.message


def reason_told(failure: Exception) -> str:
    """What a buyer is told of a failure here: nothing of this machine's folders."""
    if isinstance(failure, StoreFullError):
        return "the provider's disk is full"
    if isinstance(failure, StoreError):
        return "the provider's disk failed"
    return failure.message if isinstance(failure, P2PFlopError) else "the node failed"
