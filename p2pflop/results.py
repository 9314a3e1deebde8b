"""The result of a job, read by name: values a step, last values, and the state after the last step.

A result is a record of addresses. Its hash names all of it, so what is fetched can be checked
against that one hash, whoever delivered it: ``Result.verify`` does so, and every blob is checked
against its address when it is fetched anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from p2pflop.dht.manifest import address_of
from p2pflop.drafts import whole_file
from p2pflop.errors import JobError, VerificationError
from p2pflop.ids import content_hash
from p2pflop.job.collection import Collection, CollectionEntry
from p2pflop.job.file import JobFile, open_job
from p2pflop.job.graph import Dtype
from p2pflop.job.naming import output_names
from p2pflop.job.results import decode_trace, due_step
from p2pflop.job.safetensors import format_header
from p2pflop.job.shapes import stored_bytes
from p2pflop.job.spec import (
    MODE_COLLECT,
    MODE_TRACE,
    ROLE_STATE,
    Work,
    source_addresses,
    state_root,
    times_due,
)
from p2pflop.job.spec import Result as ResultRecord
from p2pflop.job.validate import Refusal
from p2pflop.units import NUSD_PER_USD, format_usd
from p2pflop.wire import decode, encode

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

Fetch = Callable[[bytes], bytes]

_NUMPY: Final = {
    Dtype.BOOL: "?",
    Dtype.INT8: "i1",
    Dtype.UINT8: "u1",
    Dtype.INT16: "<i2",
    Dtype.UINT16: "<u2",
    Dtype.INT32: "<i4",
    Dtype.UINT32: "<u4",
    Dtype.INT64: "<i8",
    Dtype.UINT64: "<u8",
    Dtype.FLOAT16: "<f2",
    Dtype.FLOAT32: "<f4",
    Dtype.FLOAT64: "<f8",
}


class Result(Mapping[str, "Array"]):
    """What a job gave: ``result["loss"]`` is the value at each step, of a collected output all of
    them stacked, of any other output the last.

    ``hash`` is the one hash that names all of it; ``state`` the tensors after the last step, by
    name; ``cost_usd`` what it cost. Arrays are fetched when they are asked for.
    """

    def __init__(self, record: ResultRecord, file: JobFile, fetch: Fetch, cost_nusd: int) -> None:
        self.record = record
        self.hash = content_hash(encode(record)).hex()
        self.cost_nusd = cost_nusd
        self._file = file
        self._work = decode(Work, file.body.work)
        self._fetch = fetch
        self._places = {
            name: (phase, output)
            for phase, names in enumerate(output_names(file.labels))
            for output, name in enumerate(names)
        }
        self._columns: dict[tuple[int, int], Array] | None = None

    @classmethod
    def opened(
        cls, record: bytes, file: JobFile, fetch: Fetch, *, result_hash: str, cost_nusd: int
    ) -> Self:
        """The result in an encoded record that must have ``result_hash``.

        Raises VerificationError if it has another, or is not the result of the job in ``file``.
        """
        result = cls(decode(ResultRecord, record), file, fetch, cost_nusd)
        if result.hash != result_hash:
            raise VerificationError(f"the record's hash is {result.hash}, not {result_hash}")
        result.verify(blobs=False)
        return result

    @property
    def cost_usd(self) -> float:
        """What the run cost in dollars; ``cost_nusd`` is exact."""
        return self.cost_nusd / NUSD_PER_USD

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.record.steps_done

    @property
    def state(self) -> State:
        """The state after the last step, by name."""
        names = [
            (name, Dtype(param.dtype), param.shape)
            for name, param in zip(self._file.labels.params, self._work.params, strict=True)
            if param.role == ROLE_STATE
        ]
        tensors: dict[str, _Tensor] = {}
        for (name, dtype, shape), address in zip(names, self.record.state, strict=True):
            unique = name if name not in tensors else f"{name}#{len(tensors)}"
            tensors[unique] = _Tensor(address, dtype, shape)
        return State(tensors, self._fetch)

    def __getitem__(self, name: str) -> Array:
        phase, output = self._place(name)
        mode = self._work.phases[phase].modes[output]
        if mode == MODE_TRACE:
            return self._traced(phase, output)
        if mode == MODE_COLLECT:
            return self._stacked(name)
        tensor = self._last(phase, output)
        if tensor is None:
            raise KeyError(f"{name!r} was never due in {self.steps} steps")
        return tensor.read(self._fetch)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        cost = format_usd(self.cost_nusd)
        return f"Result({self.hash[:12]}, steps={self.steps}, cost={cost}, {list(self._places)})"

    def collected(self, name: str) -> Iterator[Array]:
        """Each value of the collected output ``name``, fetched as it is asked for."""
        phase, output = self._place(name)
        if self._work.phases[phase].modes[output] != MODE_COLLECT:
            raise KeyError(f"{name!r} is not collected; pf.trace(collect=[{name!r}]) does that")
        tensor = self._last(phase, output)
        if tensor is not None:
            for entry in self._entries(tensor.address):
                yield _Tensor(entry.address, tensor.dtype, tensor.shape).read(self._fetch)

    def steps_of(self, name: str) -> list[int]:
        """The steps, from 0, to which the values of a traced or collected output belong."""
        return list(self._steps_due(name))

    def rows(self, besides: Sequence[int] = ()) -> Iterator[tuple[int, dict[str, float]]]:
        """Each step that has scalars, from 0, and those by name, as the run's rows told them; not
        of the steps ``besides``. The trace is fetched if there are any."""
        import numpy as np

        traced = self._traced_steps()
        due = np.unique(np.concatenate([np.zeros(0, "i8"), *map(np.asarray, traced.values())]))
        for step in np.setdiff1d(due, np.asarray(besides, "i8")).tolist():
            yield step, self._scalars(step, traced)

    def last_row(self) -> tuple[int, dict[str, float]]:
        """The last of ``rows``; -1 and nothing if there are none."""
        traced = self._traced_steps()
        last = max((steps[-1] for steps in traced.values() if steps), default=-1)
        return last, self._scalars(last, traced)

    def _scalars(self, step: int, traced: Mapping[str, range]) -> dict[str, float]:
        return {
            name: float(self[name][steps.index(step)])
            for name, steps in traced.items()
            if step in steps
        }

    def _traced_steps(self) -> dict[str, range]:
        return {
            name: self._steps_due(name)
            for name, (phase, output) in self._places.items()
            if self._work.phases[phase].modes[output] == MODE_TRACE
        }

    def _steps_due(self, name: str) -> range:
        phase = self._work.phases[self._place(name)[0]]
        first = self.record.first_step
        times = times_due(phase, first, self.steps)
        start = due_step(phase, first, 0)
        return range(start, start + times * phase.every, phase.every)

    def address(self, name: str) -> str:
        """Where the last value of output ``name`` is, 64 hex digits, for anyone with HTTP."""
        phase, output = self._place(name)
        tensor = self._last(phase, output)
        if tensor is None:
            raise KeyError(f"{name!r} is kept in the trace, {self.record.trace.hex()}")
        return tensor.address.hex()

    def blob(self, address: bytes) -> bytes:
        """The bytes of a blob that the result names."""
        return self._fetch(address)

    def verify(self, *, blobs: bool = True) -> None:
        """Recompute every hash: the record against the job, and all blobs against the record.

        Raises VerificationError. It shows that nothing was changed on the way, not that the
        computation is right: for that, run the job again, here or elsewhere.
        """
        record, job = self.record, self._file.body.job
        checks = {
            "work": record.work == job.work == content_hash(self._file.body.work),
            "stretch": record.first_step == job.first_step and record.steps_done <= job.steps,
            "sources": record.sources == source_addresses(self._work),
            "state root": record.state_root == state_root(record.state),
        }
        wrong = [name for name, is_right in checks.items() if not is_right]
        if wrong:
            raise VerificationError(f"result {self.hash[:12]}: its {wrong[0]} is not the job's")
        if not blobs:
            return
        wanted = [record.trace, *record.state]
        for named in record.outputs:
            wanted.append(named.address)
            if self._work.phases[named.phase].modes[named.output] == MODE_COLLECT:
                wanted += [entry.address for entry in self._entries(named.address)]
        for address in dict.fromkeys(wanted):
            if address_of(self._fetch(address)) != address:
                raise VerificationError(f"blob {address.hex()} does not match its address")

    def _place(self, name: str) -> tuple[int, int]:
        if name not in self._places:
            raise KeyError(f"{name!r} is not an output; there are {', '.join(self._places)}")
        return self._places[name]

    def _stacked(self, name: str) -> Array:
        import numpy as np

        values = list(self.collected(name))
        return np.stack(values) if values else np.zeros(0)

    def _entries(self, address: bytes) -> tuple[CollectionEntry, ...]:
        return decode(Collection, self._fetch(address)).entries

    def _traced(self, phase: int, output: int) -> Array:
        import numpy as np

        if self._columns is None:
            self._columns = {
                (column.phase, column.output): _array(column.data, Dtype(column.dtype), (-1,))
                for column in decode_trace(self._fetch(self.record.trace))
            }
        return self._columns.get((phase, output), np.zeros(0))

    def _last(self, phase: int, output: int) -> _Tensor | None:
        for named in self.record.outputs:
            if (named.phase, named.output) == (phase, output):
                opened = open_job(self._file.body)
                if isinstance(opened, Refusal):
                    raise JobError(f"the job of this result is not valid: {opened.reason}")
                checked = opened.graphs[self._work.phases[phase].graph]
                node = checked.graph.outputs[output].node
                return _Tensor(named.address, checked.dtypes[node], checked.shapes[node])
        return None


class _Tensor:
    """A tensor's blob."""

    __slots__ = ("address", "dtype", "shape")

    def __init__(self, address: bytes, dtype: Dtype, shape: tuple[int, ...]) -> None:
        self.address = address
        self.dtype = dtype
        self.shape = shape

    def read(self, fetch: Fetch) -> Array:
        return _array(fetch(self.address), self.dtype, self.shape)

    @property
    def size_bytes(self) -> int:
        return stored_bytes(self.dtype, self.shape)

    def read_bytes(self, fetch: Fetch) -> bytes:
        data = fetch(self.address)
        if len(data) != self.size_bytes:
            raise VerificationError(
                f"blob {self.address.hex()} has {len(data)} bytes, not the {self.size_bytes} of "
                f"{self.dtype.name} {self.shape}"
            )
        return data


class State(Mapping[str, "Array"]):
    """Tensors by name. ``state["net"]`` is the part below ``net.``, if no tensor has that name."""

    def __init__(self, tensors: Mapping[str, _Tensor], fetch: Fetch) -> None:
        self._tensors = tensors
        self._fetch = fetch

    def __getitem__(self, name: str) -> Any:
        if name in self._tensors:
            return self._tensors[name].read(self._fetch)
        start = f"{name}."
        below = {
            key.removeprefix(start): tensor
            for key, tensor in self._tensors.items()
            if key.startswith(start)
        }
        if not below:
            raise self._unknown(name)
        return State(below, self._fetch)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        parts = (
            f"{name}: {tensor.dtype.name.lower()}{list(tensor.shape)}"
            for name, tensor in self._tensors.items()
        )
        return f"State({', '.join(parts)})"

    def address(self, name: str) -> str:
        """Where the tensor's bytes are, 64 hex digits, for anyone with HTTP."""
        if name not in self._tensors:
            raise self._unknown(name)
        return self._tensors[name].address.hex()

    def _unknown(self, name: str) -> KeyError:
        return KeyError(f"no state {name!r}; there are {', '.join(self._tensors)}")

    def tensors(self) -> dict[str, Any]:
        """All of them by name as lazy tensors of tinygrad, for ``nn.state.load_state_dict``.

        Their bytes are fetched when a program here computes with them. A job that is traced with
        them names them by their addresses, and nothing travels that the node has.
        """
        from p2pflop.kernels.weights import Stored, lazy_tensor

        def lazy(tensor: _Tensor) -> Any:
            read = partial(tensor.read_bytes, self._fetch)
            stored = Stored(read, tensor.size_bytes, tensor.address)
            return lazy_tensor(stored, tensor.dtype, tensor.shape)

        return {name: lazy(tensor) for name, tensor in self._tensors.items()}

    def save(self, path: str | Path) -> Path:
        """Write all of them to a safetensors file, which appears only when it is whole; its path.

        They are fetched one at a time. Raises ConfigError if the file cannot be written,
        StoreFullError if the disk is full.
        """
        target = Path(path)
        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}
        with whole_file(target) as file:
            file.write(format_header(kinds))
            for tensor in self._tensors.values():
                file.write(tensor.read_bytes(self._fetch))
        return target


def _array(data: bytes, dtype: Dtype, shape: tuple[int, ...]) -> Array:
    """A numpy array over ``data``; bfloat16, which numpy lacks, becomes float32."""
    import numpy as np

    try:
        if dtype is Dtype.BFLOAT16:
            upper = np.frombuffer(data, "<u2").astype("<u4") << 16
            return upper.view("<f4").reshape(shape)
        return np.frombuffer(data, _NUMPY[dtype]).reshape(shape)
    except ValueError as error:
        raise VerificationError(f"{len(data)} bytes are not {dtype.name} {shape}") from error
