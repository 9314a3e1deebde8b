"""``python -m p2pflop.kernels.device_probe [NAME...]``: what devices say of themselves.

Without names, the device that ``DEV`` names is opened and a small graph of many kinds of operations
is lowered and run on it; those with names are only opened. One line of JSON goes to stdout: by name
(empty without one) ``backend``, ``arch`` and ``compiler``, or ``error``. A process of its own,
since drivers start threads and may hang.
"""

from __future__ import annotations

import json
import os
import sys

from tinygrad import Device


def main(names: list[str]) -> None:
    """Print the line. What drivers print goes to stderr."""
    stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    told = {name: _told(name) for name in names or [""]}
    stdout.write(json.dumps(told) + "\n")
    stdout.flush()


def _told(name: str) -> dict[str, str]:
    from p2pflop.kernels.tinygrad_engine import create

    try:
        told = _look(name or Device.DEFAULT)
        if not name:
            create().rehearse()
    # Each driver has its own way to fail; whoever started this process wants one line.
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return told


def _look(name: str) -> dict[str, str]:
    renderer = Device[name].renderer
    return {
        "backend": f"{name}:{renderer.target.renderer or type(renderer).__name__}",
        "arch": renderer.target.arch,
        "compiler": type(renderer.compiler).__name__,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
