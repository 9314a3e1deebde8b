"""Device CLOUD gives the bytes of device CPU, for each of many operations and shapes."""

from __future__ import annotations

import os

import pytest
from tinygrad import Device, Tensor
from tinygrad.helpers import Context

from tests.cloud_ops import TABLE, Case
from tests.cloud_twin import shared_twin

SHARE = 4
"""One case in so many is tried at every change, all with the slow tests."""
_CASES = [
    pytest.param(name, marks=[pytest.mark.slow] if number % SHARE else [], id=name)
    for number, name in enumerate(TABLE)
]


def outcome(case: Case, device: str) -> list[tuple[object, ...]]:
    """The tensors of a case, computed on ``device``."""
    with Context(DEV=device):
        made = case()
        tensors = [made] if isinstance(made, Tensor) else list(made)
        # What depends on no buffer has no device of its own: then it is told one.
        tensors = [t if t.device is not None else t.clone(Device.DEFAULT) for t in tensors]
        Tensor.realize(*tensors)
        assert {t.device for t in tensors} == {device.split(";")[0].split(":")[0]}
        return [(t.dtype, t.shape, t.numpy().tobytes()) for t in tensors]


@pytest.mark.parametrize("name", _CASES)
def test_equal_bytes(name: str) -> None:
    shared_twin()
    cloud = f"CLOUD;{os.environ['DEV']}"
    assert outcome(TABLE[name], cloud) == outcome(TABLE[name], os.environ["DEV"])


def test_the_table_is_large() -> None:
    assert len(TABLE) > 250
