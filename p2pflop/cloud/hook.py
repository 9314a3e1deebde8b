"""How tinygrad comes by device ``CLOUD``: two import finders, and nothing before they are asked.

tinygrad finds a device by importing ``tinygrad.runtime.ops_NAME``. A finder serves that name. When
the package itself is imported the same finder lets the ordinary ones load it, and then has the
three hooks of ``p2pflop.cloud.realizing`` put in, so that they are there before anything is
realized.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.abc
import importlib.machinery
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

from p2pflop.errors import ConfigError

DEVICE: Final = "CLOUD"
TINYGRAD_VERSION: Final = "0.14.0"
_PACKAGE: Final = "tinygrad"
_DEVICE_MODULE: Final = "tinygrad.runtime.ops_cloud"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the device's module, and sees the package's import pass."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See importlib."""
        if fullname == _DEVICE_MODULE:
            return importlib.machinery.ModuleSpec(fullname, self)
        if fullname != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Passing(spec.loader)
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:  # noqa: ARG002
        """See importlib."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """See importlib."""
        device = importlib.import_module("p2pflop.cloud.device")
        vars(module)["CloudDevice"] = device.CloudDevice


class _Passing(importlib.abc.Loader):
    """Loads tinygrad as it would be loaded, with ``DEV`` set before and the hooks put in after."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """See importlib."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See importlib. Raises ConfigError for another version of tinygrad."""
        check_version()
        os.environ.setdefault("DEV", DEVICE)
        _find_compiler()
        self._loader.exec_module(module)
        importlib.import_module("p2pflop.cloud.realizing").install()


def install() -> None:
    """Serve device ``CLOUD``, as the default unless ``DEV`` is set. May be called again.

    Raises ConfigError if tinygrad is there already and is another version than ours.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    atexit.register(_farewell)
    if _PACKAGE in sys.modules:
        check_version()
        _make_default()
        _find_compiler()
        importlib.import_module("p2pflop.cloud.realizing").install()


def check_version() -> None:
    """Raises ConfigError unless the installed tinygrad is the one that the hooks are made for."""
    import importlib.metadata

    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "a checkout without a version"
    if version != TINYGRAD_VERSION:
        raise ConfigError(
            f"CLOUD=1 needs tinygrad {TINYGRAD_VERSION}, and {version} is installed",
            hint=f"Run pip install tinygrad=={TINYGRAD_VERSION}, or run without CLOUD.",
        )


def _find_compiler() -> None:
    """What a script writes to a file passes tinygrad's own CPU device, which runs ``clang``: that
    of this environment, where it is not on PATH because the environment is not activated."""
    beside = Path(sys.executable).with_name("clang")
    if "CC" not in os.environ and shutil.which("clang") is None and beside.is_file():
        os.environ["CC"] = str(beside)


def _make_default() -> None:
    """tinygrad was imported before us: it has read ``DEV`` already."""
    from tinygrad.helpers import DEV

    if not os.environ.get("DEV"):
        os.environ["DEV"] = DEV.value = DEVICE


def _farewell() -> None:
    # Registered before anything of the script's, so that it runs after all of that.
    process = sys.modules.get("p2pflop.cloud.process")
    if process is not None:
        process.farewell()
