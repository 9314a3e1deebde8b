"""What a job is, costs and would be sold for, as ``p2pflop show`` and ``trace`` tell it.

Everything but the quote is counted here, from the job alone: no node is asked, none is started.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from p2pflop.cli.output import Flags, field_lines, table_lines
from p2pflop.cli.progress import ranked_lines
from p2pflop.errors import ConfigError, NodeUnreachableError, P2PFlopError
from p2pflop.job.file import CheckedJob, encode_file
from p2pflop.job.graph import Dtype
from p2pflop.job.meter import METER_ID, init_graphs, meter
from p2pflop.job.spec import (
    BlobSource,
    FeedSource,
    InitSource,
    MemberSource,
    NoSource,
    ResultSource,
    class_id,
    times_due,
)
from p2pflop.units import format_bytes, format_flop

if TYPE_CHECKING:
    from p2pflop.sdk import Job

INIT: Final = "init"
MAX_OPS_SHOWN: Final = 8
_ROLES: Final = ("input", "state", "feed", "step", "seed")
_SOURCES: Final = {
    NoSource: "the run",
    BlobSource: "blob",
    InitSource: "the seed",
    FeedSource: "shards",
    MemberSource: "collection",
    ResultSource: "another job",
}


def describe(job: Job) -> dict[str, Any]:
    """What a job is, as JSON in Python."""
    opened, labels = job.checked, job.file.labels
    stretch = opened.job
    names = zip(labels.phases, labels.outputs, opened.work.phases, strict=True)
    return {
        "title": labels.title,
        "work": opened.work_id.hex(),
        "first_step": stretch.first_step,
        "steps": stretch.steps,
        "seed": opened.work.seed,
        "size_bytes": job.size_bytes,
        "phases": [
            {
                "name": name,
                "graph": phase.graph.hex(),
                "every": phase.every,
                "times": times_due(phase, stretch.first_step, stretch.steps),
                "outputs": list(outputs),
                "ops": _ops(opened, phase.graph),
            }
            for name, outputs, phase in names
        ],
        "tensors": _tensors(job),
        **describe_meter(job),
        **_describe_class(),
    }


def describe_meter(job: Job) -> dict[str, Any]:
    """What a job costs: in all, and a line for each phase and init graph, of one run of it."""
    from p2pflop.node.execute import memory_bytes
    from p2pflop.node.orders import checkpoint_steps, collected_bytes, moved_bytes

    opened = job.checked
    work, stretch = opened.work, opened.job
    lines = []
    for number, (name, phase) in enumerate(zip(job.file.labels.phases, work.phases, strict=True)):
        times = times_due(phase, stretch.first_step, stretch.steps)
        line = _line(opened, name, phase.graph, times)
        lines.append(line | {"moved_bytes": collected_bytes(opened, number)})
    if stretch.first_step == 0:
        inits = [_line(opened, INIT, graph, 1) for graph in init_graphs(work)]
        lines += [line | {"moved_bytes": 0} for line in inits]
    every = checkpoint_steps(stretch, None)
    return {
        "meter": METER_ID,
        "flop": opened.cost.flop,
        "touched_bytes": opened.cost.touched_bytes,
        "peak_bytes": opened.cost.peak_bytes,
        "memory_bytes": memory_bytes(opened),
        "moved_bytes": moved_bytes(opened, every),
        "cost": lines,
    }


def describe_quote(flags: Flags, job: Job) -> dict[str, Any]:
    """The deals and misses of now, or None and why; a node is asked only if it runs."""
    try:
        with flags.client() as client:
            return {"quote": client.quote(encode_file(job.file)), "quote_reason": ""}
    except NodeUnreachableError as error:
        reason = f"{error.message}: see p2pflop submit FILE --quote"
    except P2PFlopError as error:
        reason = error.message
    return {"quote": None, "quote_reason": reason}


def job_lines(about: dict[str, Any]) -> list[str]:
    """What ``describe`` gave, for a person."""
    moved_bytes = sum(tensor["size_bytes"] for tensor in about["tensors"])
    made = about["class"]
    fields = [
        ("title", about["title"]),
        ("work", about["work"]),
        ("steps", f"{about['steps']} from {about['first_step']}"),
        ("seed", about["seed"]),
        ("size", f"{about['size_bytes']:,} bytes, and {format_bytes(moved_bytes)} of inputs"),
        ("class", f"{made['name']} {made['id'][:12]}" if made else about["class_reason"]),
    ]
    phases = (
        (phase["name"], phase["every"], phase["times"], ", ".join(phase["outputs"]))
        for phase in about["phases"]
    )
    ops = (
        (phase["name"], sum(phase["ops"].values()), _most(phase["ops"]))
        for phase in about["phases"]
    )
    tensors = (
        (tensor["name"], tensor["role"], f"{tensor['dtype']}{tensor['shape']}", tensor["from"])
        for tensor in about["tensors"]
    )
    return [
        *field_lines([*fields, *_meter_fields(about)]),
        "",
        *_cost_table(about),
        "",
        *table_lines(("PHASE", "EVERY", "TIMES", "OUTPUTS"), phases),
        "",
        *table_lines(("PHASE", "NODES", "MOST OF THEM"), ops),
        "",
        *(table_lines(("TENSOR", "ROLE", "TYPE", "FROM"), tensors) or ["It has no tensors."]),
    ]


def meter_lines(about: dict[str, Any]) -> list[str]:
    """What ``describe_meter`` gave, for a person."""
    return [*field_lines(_meter_fields(about)), "", *_cost_table(about)]


def quote_lines(told: dict[str, Any]) -> list[str]:
    """What ``describe_quote`` gave, for a person."""
    if told["quote"] is None:
        return [f"no quote: {told['quote_reason']}"]
    return ranked_lines(told["quote"]) or ["no quote: the order book is empty"]


def _meter_fields(about: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("cost", format_flop(about["flop"])),
        ("touches", format_bytes(about["touched_bytes"])),
        ("memory", f"up to {format_bytes(about['peak_bytes'])}"),
        ("moves", format_bytes(about["moved_bytes"])),
    ]


def _cost_table(about: dict[str, Any]) -> list[str]:
    rows = (
        (
            line["phase"],
            line["times"],
            format_flop(line["flop"]),
            *(format_bytes(line[f"{what}_bytes"]) for what in ("touched", "peak", "moved")),
        )
        for line in about["cost"]
    )
    return table_lines(("PHASE", "TIMES", "FLOP A RUN", "TOUCHED", "PEAK", "MOVED"), rows)


def _line(opened: CheckedJob, name: str, graph: bytes, times: int) -> dict[str, Any]:
    cost = meter(opened.graphs[graph])
    return {
        "phase": name,
        "graph": graph.hex(),
        "times": times,
        "flop": cost.flop,
        "touched_bytes": cost.touched_bytes,
        "peak_bytes": cost.peak_bytes,
    }


def _tensors(job: Job) -> list[dict[str, Any]]:
    tensors, members = [], dict(job.checked.inputs)
    params = zip(job.file.labels.params, job.checked.work.params, strict=True)
    for slot, (name, param) in enumerate(params):
        source = param.source
        blob = members.get(slot, source if isinstance(source, BlobSource) else None)
        tensors.append(
            {
                "name": name,
                "role": _ROLES[param.role],
                "dtype": Dtype(param.dtype).name.lower(),
                "shape": list(param.shape),
                "from": _SOURCES[type(source)],
                "address": blob.address.hex() if blob else None,
                "size_bytes": blob.size_bytes if blob else 0,
            }
        )
    return tensors


def _ops(opened: CheckedJob, graph: bytes) -> dict[str, int]:
    """How many nodes of each operation a graph has, most first."""
    counts = Counter(node.op.name.lower() for node in opened.graphs[graph].graph.nodes)
    return dict(counts.most_common())


def _most(ops: dict[str, int]) -> str:
    shown = [f"{count} {op}" for op, count in list(ops.items())[:MAX_OPS_SHOWN]]
    return ", ".join([*shown, *(["..."] if len(ops) > MAX_OPS_SHOWN else [])])


def _describe_class() -> dict[str, Any]:
    """The determinism class in which this machine would compute it."""
    from p2pflop.kernels.classes import descriptor

    try:
        found = descriptor()
    except ConfigError as error:
        return {"class": None, "class_reason": error.message}
    fields = {name: getattr(found, name) for name in found.__struct_fields__}
    return {"class": {"id": class_id(found).hex(), **fields}, "class_reason": ""}
