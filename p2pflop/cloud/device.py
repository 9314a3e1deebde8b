"""tinygrad's device ``CLOUD``: memory that lies at a provider.

``CLOUD``, ``CLOUD:1``, ... are devices of one session, inside one provider. Kernels are not made
here: graphs are sent as they are, see ``realizing``.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tinygrad.device import BufferSpec, Compiled, LRUAllocator
from tinygrad.helpers import DEBUG
from tinygrad.renderer import Renderer

from p2pflop.cloud.counters import count
from p2pflop.cloud.hook import DEVICE
from p2pflop.cloud.memory import Region
from p2pflop.cloud.process import LOCK, Cloud, is_open, the_cloud
from p2pflop.errors import P2PFlopError
from p2pflop.job.commands import MAX_WRITE_BYTES, Copy, Load, Read, Write


def is_cloud(device: object) -> bool:
    """Whether tinygrad's name of a device is one of ours."""
    return isinstance(device, str) and device.split(":", 1)[0] == DEVICE


def cloud() -> Cloud:
    """The session, opened at its first use. Raises P2PFlopError."""
    return the_cloud(count, verbose=DEBUG.value >= 2)


class CloudAllocator(LRUAllocator):
    """Buffers by number. Freed ones are used again for the same size, and say nothing."""

    def __init__(self, device: CloudDevice) -> None:
        super().__init__(device, supports_copy_from_disk=False, supports_transfer=True)

    def alloc(self, size: int, options: BufferSpec | None = None) -> Region:
        """See tinygrad, whose own MemoryError does not tell what sets the limit."""
        with LOCK:
            try:
                region: Region = super().alloc(size, options)
            except MemoryError as error:
                raise (error.__cause__ or error) from None
            return region

    def free(self, opaque: Region, size: int, options: BufferSpec | None = None) -> None:
        """See tinygrad."""
        with LOCK:
            super().free(opaque, size, options)

    def _alloc(self, size: int, options: BufferSpec) -> Region:  # noqa: ARG002
        return cloud().memory.allocate(size)

    def _free(self, opaque: Region, options: BufferSpec) -> None:  # noqa: ARG002
        with suppress(P2PFlopError):  # a session that is over has nothing left to free
            cloud().memory.free(opaque)

    def _copyin(self, dest: Region, src: memoryview) -> None:
        place = cloud()
        data = src.cast("B")
        if len(data) <= MAX_WRITE_BYTES:
            command: Write | Load = Write(dest.buffer, dest.offset_bytes, bytes(data))
        else:
            address = place.put_blob(data)
            command = Load(dest.buffer, dest.offset_bytes, address, len(data))
        with LOCK:
            place.session.run(command)

    def _copyout(self, dest: memoryview, src: Region) -> None:
        command = Read(src.buffer, src.offset_bytes, len(dest))
        with LOCK:
            dest[:] = cloud().session.read(command)

    def _transfer(self, dest: Region, src: Region, sz: int, **_: Any) -> None:
        target, source = (dest.buffer, dest.offset_bytes), (src.buffer, src.offset_bytes)
        if target != source:
            with LOCK:
                cloud().session.run(Copy(target, source, sz))

    def _offset(self, buf: Region, size: int, offset: int) -> Region:
        return Region(buf.buffer, buf.offset_bytes + offset, size)

    def _map(self, buf: Any) -> Any:  # noqa: ARG002
        raise RuntimeError("memory of device CLOUD cannot be mapped")


class CloudRenderer(Renderer):
    """There is none: what would need one is not a graph."""

    has_local = False


class CloudDevice(Compiled):
    """What tinygrad finds by the name ``CLOUD``."""

    def __init__(self, device: str) -> None:
        super().__init__(device, CloudAllocator(self), [CloudRenderer], None)

    def synchronize(self) -> None:
        """Wait until the provider has done all that was asked for."""
        if is_open():
            with LOCK:
                cloud().session.synchronize()
