"""The results of stretches that follow one another, joined into that of the whole.

What comes out is byte for byte what one run over all steps would have given: traces and collections
go on where those of the stretch before end, of any other output the last value counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pflop.errors import ProtocolError
from p2pflop.job.collection import COLLECTION_VERSION, Collection
from p2pflop.job.results import TraceLog, decode_trace
from p2pflop.job.spec import NamedOutput, Result
from p2pflop.wire import decode, encode


def follow_one_another(parts: Sequence[Result]) -> bool:
    """Whether each begins where the one before it ends, of one work in one class."""
    firsts = {(part.work, part.class_id, part.sources) for part in parts}
    ends = [part.first_step + part.steps_done for part in parts]
    return len(firsts) == 1 and all(
        end == part.first_step for end, part in zip(ends, parts[1:], strict=False)
    )


def outputs_by_place(parts: Sequence[Result]) -> dict[tuple[int, int], list[NamedOutput]]:
    """What the parts have of each output, by phase and place in it, in the order of the parts."""
    found: dict[tuple[int, int], list[NamedOutput]] = {}
    for part in parts:
        for output in part.outputs:
            found.setdefault((output.phase, output.output), []).append(output)
    return found


def join_traces(traces: Sequence[bytes]) -> bytes:
    """The trace blob of all stretches. Raises ProtocolError if one is not valid, or if they do not
    agree on a dtype."""
    log = TraceLog()
    for data in traces:
        for column in decode_trace(data):
            log.extend(column)
    return log.encode()


def join_collections(collections: Sequence[bytes]) -> bytes:
    """The collection of the entries of all. Raises ProtocolError unless their names rise."""
    entries = [entry for data in collections for entry in decode(Collection, data).entries]
    try:
        return encode(Collection(COLLECTION_VERSION, tuple(entries)))
    except ValueError as error:
        raise ProtocolError(f"the stretches do not follow one another: {error}") from error
