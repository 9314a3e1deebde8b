"""The hooks in tinygrad: which version they are for, and that each is still there to be hooked."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tinygrad.engine.jit
import tinygrad.engine.realize
import tinygrad.schedule
import tinygrad.tensor
from tinygrad.uop.ops import Ops, UOp

from p2pflop.cloud import hook, realizing
from p2pflop.cloud.hook import TINYGRAD_VERSION, check_version
from p2pflop.errors import ConfigError

CLANG = str(Path(sys.executable).with_name("clang"))
CHANGED = "tinygrad has changed: see p2pflop/cloud/realizing.py"


def parameters(function: object) -> list[str]:
    assert callable(function)
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def test_the_installed_version_is_the_one_that_is_hooked() -> None:
    assert importlib.metadata.version("tinygrad") == TINYGRAD_VERSION
    check_version()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.15.0")
    with pytest.raises(ConfigError, match=r"needs tinygrad 0\.14\.0, and 0\.15\.0 is") as caught:
        check_version()
    assert "pip install tinygrad==0.14.0" in caught.value.hint


def test_realizing_asks_for_a_linear_by_a_name_in_the_module_of_tensors() -> None:
    source = inspect.getsource(tinygrad.tensor.Tensor.linear_with_vars)
    assert "return create_linear_with_vars(big_sink)" in source, CHANGED
    source = inspect.getsource(tinygrad.schedule)
    assert "def create_linear_with_vars(big_sink:UOp) -> tuple[UOp, dict[str, int]]" in source
    assert "capturing[0].add_linear(linear, var_vals)" in source, CHANGED


def test_calls_are_executed_by_rules_that_are_looked_up_each_time() -> None:
    source = inspect.getsource(tinygrad.engine.realize.run_linear)
    assert "pm_exec.rewrite(call, ctx)" in source, CHANGED
    fields = inspect.signature(tinygrad.engine.realize.ExecContext).parameters
    assert {"var_vals", "input_uops", "wait"} <= set(fields), CHANGED


def test_statistics_ask_for_the_kernels_of_a_call() -> None:
    assert parameters(realizing._kernels) == ["call"], CHANGED
    source = inspect.getsource(tinygrad.engine.realize.track_stats)
    assert source.count("get_call_kernels(call)") == 2, CHANGED


def test_a_jit_asks_what_a_call_writes() -> None:
    assert parameters(realizing._outs_ins) == ["call"], CHANGED
    source = inspect.getsource(tinygrad.engine.jit.CapturedJit)
    assert "outs, ins = get_call_outs_ins(call)" in source, CHANGED


def test_what_is_on_no_device_is_read_by_way_of_the_host() -> None:
    source = inspect.getsource(inspect.unwrap(realizing._buffer))
    assert 'if self.uop.device is None or isinstance(self.device, tuple): x = x.clone("CPU")' in (
        source
    ), CHANGED
    for reader in (tinygrad.tensor.Tensor.data, tinygrad.tensor.Tensor.numpy):
        assert "self._buffer()" in inspect.getsource(inspect.unwrap(reader)), CHANGED


def test_a_realize_is_a_call_of_a_sink_of_assignments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[UOp] = []
    monkeypatch.setattr(tinygrad.tensor, "create_linear_with_vars", lambda call: seen.append(call))
    (tinygrad.tensor.Tensor([1, 2]) + 1).linear_with_vars()
    [call] = seen
    assert (call.op, call.src[0].op) == (Ops.CALL, Ops.SINK), CHANGED
    for root in call.src[0].src:
        assert (root.op, root.src[1].op) == (Ops.AFTER, Ops.STORE), CHANGED
    params = {node.arg.slot for node in call.src[0].toposort() if node.op is Ops.PARAM}
    assert params == set(range(len(call.src) - 1)), CHANGED


def test_it_can_be_installed_again() -> None:
    before = len(sys.meta_path)
    hook.install()
    realizing.install()
    assert len(sys.meta_path) == before
    assert realizing._create is not realizing.create_linear


@pytest.mark.parametrize(
    ("code", "variables", "told"),
    [
        ("import tinygrad; print(tinygrad.Device.DEFAULT)", {"CLOUD": "1"}, "CLOUD"),
        ("import p2pflop.cloud, tinygrad; print(tinygrad.Device.DEFAULT)", {}, "CLOUD"),
        ("import tinygrad, p2pflop.cloud; print(tinygrad.Device.DEFAULT)", {}, "CLOUD"),
        ("import tinygrad; print(tinygrad.Device.DEFAULT)", {"CLOUD": "1", "DEV": "CPU"}, "CPU"),
        ("import tinygrad; print(tinygrad.Device.DEFAULT)", {"CLOUD": "0", "DEV": "CPU"}, "CPU"),
        ("import tinygrad, os; print(os.environ['CC'])", {"CLOUD": "1", "PATH": ""}, CLANG),
        ("import tinygrad, os; print(os.environ.get('CC'))", {"PATH": "", "DEV": "CPU"}, "None"),
        ("import tinygrad, os; print(os.environ['CC'])", {"CLOUD": "1", "CC": "mine"}, "mine"),
        (
            "import p2pflop.cloud, tinygrad; from tinygrad.runtime.ops_cloud import CloudDevice",
            {},
            "",
        ),
    ],
)
def test_what_a_script_begins_with(code: str, variables: dict[str, str], told: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("DEV", "CC")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, told), done.stderr
