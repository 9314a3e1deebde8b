"""What the provider has done, in tinygrad's counters and in its ``DEBUG=2`` lines."""

from __future__ import annotations

from tinygrad.helpers import DEBUG, GlobalCounters, colored, time_to_str

from p2pflop.cloud.hook import DEVICE
from p2pflop.job.commands import Ran
from p2pflop.units import NS_PER_S


def count(ran: Ran) -> None:
    """Add it to ``GlobalCounters``; with ``DEBUG=2`` print a line like that of a kernel."""
    seconds = ran.busy_ns / NS_PER_S
    GlobalCounters.kernel_count += ran.kernels
    GlobalCounters.global_ops += ran.flop
    GlobalCounters.global_mem += ran.touched_bytes
    GlobalCounters.time_sum_s += seconds
    if DEBUG.value >= 2 and ran.kernels:
        print(line(ran, seconds))  # noqa: T201  where tinygrad's own lines go


def line(ran: Ran, seconds: float) -> str:
    """As tinygrad words it: the count of kernels, memory, time, speed."""
    head = colored(f"*** {DEVICE:7s} {GlobalCounters.kernel_count:4d}", "green")
    took = colored(time_to_str(seconds, w=9), "yellow" if seconds > 0.01 else None)
    flops, bandwidth = ran.flop / (seconds or 1e-20), ran.touched_bytes / (seconds or 1e-20)
    return (
        f"{head} {f'graph of {ran.kernels} kernels':46s} "
        f"mem {GlobalCounters.mem_used / 1e9:6.2f} GB "
        f"tm {took}/{GlobalCounters.time_sum_s * 1e3:9.2f}ms "
        f"({flops * 1e-9:7.0f} GFLOPS {bandwidth * 1e-9:4.0f} GB/s)"
    )
