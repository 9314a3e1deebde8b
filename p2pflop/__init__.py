"""p2pflop: a peer-to-peer market for compute.

One rule makes a job of a tinygrad function: a lazy tensor travels as its graph, a realized one as
a blob, an assigned one is state.

    import p2pflop as pf

    job = pf.trace(train, steps=1000, every={100: test}, seed=0)
    run = pf.submit(job, max_usd=0.05)
    for row in run:
        print(row)
    result = run.result()

Names are imported when they are first used, so that ``import p2pflop`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pflop.client import Client
    from p2pflop.errors import (
        BlobNotFoundError,
        ConfigError,
        HomeLockedError,
        JobError,
        MarketError,
        NodeUnreachableError,
        P2PFlopError,
        ProtocolError,
        ProviderError,
        StoreError,
        StoreFullError,
        TraceWarning,
        VerificationError,
    )
    from p2pflop.models import load_safetensors, trace_onnx
    from p2pflop.outcomes import Outcome
    from p2pflop.results import Result
    from p2pflop.runs import Row, Run
    from p2pflop.sdk import Job, attach, feed, get, load, put, submit, trace
    from p2pflop.sweeps import Sweep, attach_sweep, map  # noqa: A004 - as pf.map

    step: Any

__version__ = "0.1.0"

__all__ = [
    "BlobNotFoundError",
    "Client",
    "ConfigError",
    "HomeLockedError",
    "Job",
    "JobError",
    "MarketError",
    "NodeUnreachableError",
    "Outcome",
    "P2PFlopError",
    "ProtocolError",
    "ProviderError",
    "Result",
    "Row",
    "Run",
    "StoreError",
    "StoreFullError",
    "Sweep",
    "TraceWarning",
    "VerificationError",
    "__version__",
    "attach",
    "attach_sweep",
    "feed",
    "get",
    "load",
    "load_safetensors",
    "map",
    "put",
    "step",
    "submit",
    "trace",
    "trace_onnx",
]

_HOMES = {
    "Client": "client",
    "Result": "results",
    "Row": "runs",
    "Run": "runs",
    "Job": "sdk",
    "attach": "sdk",
    "attach_sweep": "sweeps",
    "feed": "sdk",
    "get": "sdk",
    "load": "sdk",
    "load_safetensors": "models",
    "map": "sweeps",
    "Outcome": "outcomes",
    "Sweep": "sweeps",
    "put": "sdk",
    "submit": "sdk",
    "trace": "sdk",
    "trace_onnx": "models",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'p2pflop' has no attribute {name!r}")
    if name == "step":
        # Not kept: it is another tensor for another default device.
        return importlib.import_module("p2pflop.kernels.steps").step_tensor()
    module = importlib.import_module(f"p2pflop.{_HOMES.get(name, 'errors')}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
