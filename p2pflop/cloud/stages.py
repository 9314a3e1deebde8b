"""One realize of a script in the order in which it can be done: copies, graphs, what the host does.

tinygrad asks for everything at once: CALL(SINK of AFTER(x, STORE(x, value)) over PARAMs, *buffers).
Where a value moves between the host and the cloud there is a COPY among its nodes. Each such COPY
is cut: what it copies is computed into a buffer of its own, unless it is one already, and what
uses it reads the buffer that it is copied to. Between two cuts all is of one kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad.uop.ops import GroupOp, Ops, UOp

from p2pflop.cloud.device import is_cloud
from p2pflop.errors import JobError


@dataclass(frozen=True, slots=True)
class CopyStage:
    """Copy one buffer to another."""

    target: UOp
    source: UOp


@dataclass(frozen=True, slots=True)
class GraphStage:
    """Compute a SINK over PARAMs, in the cloud or by the host's own devices."""

    sink: UOp
    in_cloud: bool


Stage = CopyStage | GraphStage


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages in order, and the buffers that their PARAMs stand for."""

    stages: tuple[Stage, ...]
    buffers: tuple[UOp, ...]


def cut(body: UOp, buffers: Sequence[UOp]) -> Stages:
    """The stages of a CALL's body and arguments. Raises JobError."""
    nodes = list(body.toposort())
    if len({buffer.device for buffer in buffers} - {None}) > 1:
        _check_devices(nodes)
    copies = [node for node in nodes if node.op is Ops.COPY and _is_cut(node)]
    if not copies:
        return Stages((GraphStage(body, _in_cloud(body.src)),), tuple(buffers))
    return _Cutter(body, nodes, copies, buffers).cut()


def _check_devices(nodes: Sequence[UOp]) -> None:
    """Raises RuntimeError, as tinygrad does, for an operation on tensors of several devices."""
    for node in nodes:
        if node.op in GroupOp.ALU or node.op in (Ops.STACK, Ops.STORE):
            devices = sorted({source.device for source in node.src} - {None})
            if len(devices) > 1:
                raise RuntimeError(f"all buffers must be on the same device: {devices}")


def _is_cut(copy: UOp) -> bool:
    to_cloud, from_cloud = is_cloud(copy.arg), is_cloud(copy.src[0].device)
    if to_cloud and from_cloud:
        return copy.arg != copy.src[0].device and _whole(copy.src[0]) is not None
    return to_cloud or from_cloud


def _in_cloud(roots: Sequence[UOp]) -> bool:
    kinds = {is_cloud(root.device) for root in roots}
    if len(kinds) != 1:
        raise JobError("a tensor in the cloud and one that is not cannot be one operation's")
    return kinds.pop()


def _whole(uop: UOp) -> UOp | None:
    """The PARAM that ``uop`` is all of, in some shape."""
    while uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    return uop if uop.op is Ops.PARAM else None


class _Cutter:
    def __init__(
        self, body: UOp, nodes: Sequence[UOp], copies: Sequence[UOp], buffers: Sequence[UOp]
    ) -> None:
        self._body = body
        self._nodes = nodes
        self._copies = copies
        self._buffers = list(buffers)
        self._users: dict[UOp, list[UOp]] = defaultdict(list)
        for node in nodes:
            for source in node.src:
                self._users[source].append(node)
        self._levels: dict[UOp, int] = {}
        self._replaced: dict[UOp, UOp] = {}

    def cut(self) -> Stages:
        """See ``cut``."""
        self._set_levels()
        stages: list[Stage] = []
        later: dict[int, list[CopyStage]] = defaultdict(list)
        temporary: dict[int, list[UOp]] = defaultdict(list)
        for copy in self._copies:
            source = _whole(copy.src[0])
            level = self._levels[copy.src[0]]
            if source is None:
                whole = copy.src[0].contiguous() if copy.src[0].op is Ops.CONST else copy.src[0]
                source = self._new(whole, str(whole.device))
                kept = source.reshape(whole.shape)
                temporary[level].append(kept.after(kept.store(whole)))
                later[level].append(self._copy(copy, source))
            else:
                stages.append(self._copy(copy, source))
        roots = [root for root in self._body.src if root not in self._replaced]
        for level in range(1 + max(self._levels[root] for root in self._body.src)):
            due = [root for root in roots if self._levels[root] == level] + temporary[level]
            stages += self._graphs(due)
            self._replaced.update({root: root.src[0] for root in due})
            stages += later[level]
        return Stages(tuple(stages), tuple(self._buffers))

    def _set_levels(self) -> None:
        """How many copies of computed values lie below each node."""
        cuts = set(self._copies)
        for node in self._nodes:
            level = max((self._levels[source] for source in node.src), default=0)
            computed = node in cuts and _whole(node.src[0]) is None
            self._levels[node] = level + computed

    def _graphs(self, roots: Sequence[UOp]) -> list[Stage]:
        found: list[Stage] = []
        for in_cloud in (True, False):
            own = [root for root in roots if is_cloud(root.device) is in_cloud]
            if own:
                sink = UOp.sink(*own).substitute(self._replaced)
                found.append(GraphStage(sink, in_cloud))
        return found

    def _copy(self, copy: UOp, source: UOp) -> CopyStage:
        """The stage of a COPY, straight to where it is stored if nothing else is there."""
        after = self._stored(copy)
        if after is None:
            target = self._new(copy, copy.arg)
            self._replaced[copy] = target.reshape(copy.shape)
        else:
            target = _whole(after.src[0])
            self._replaced[after] = after.src[0]
        return CopyStage(self._buffers[target.arg.slot], self._buffers[source.arg.slot])

    def _stored(self, copy: UOp) -> UOp | None:
        """The assignment of ``copy`` to all of a buffer that nobody reads before."""
        store, *others = self._users[copy]
        if others or store.op is not Ops.STORE or store.src[1] is not copy or len(store.src) != 2:
            return None
        after, *others = self._users[store]
        view = store.src[0]
        target = _whole(view)
        if others or after.op is not Ops.AFTER or after.src != (view, store) or target is None:
            return None
        if set(self._users[view]) != {store, after}:
            return None
        while view is not target:
            view = view.src[0]
            if len(set(self._users[view])) != 1 + (view is after.src[0]):
                return None
        return after

    def _new(self, like: UOp, device: str) -> UOp:
        """The PARAM of a new buffer for ``like``."""
        buffer = UOp.new_buffer(device, like.max_numel(), like.dtype)
        self._buffers.append(buffer)
        return UOp.param(len(self._buffers) - 1, like.dtype, buffer.shape, device)
