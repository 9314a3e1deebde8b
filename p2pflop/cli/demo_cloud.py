"""The end of the demo: a script that knows nothing of p2pflop, run under ``CLOUD=1``.

Its provider is killed with -9 in the middle. What it prints has to be what it prints when
tinygrad runs it on this machine, to the last digit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from p2pflop.cli.demo_nodes import DemoNode, Market
from p2pflop.cli.output import say
from p2pflop.errors import P2PFlopError, VerificationError
from p2pflop.units import counted

PLAIN: Final = Path("plain") / "digits.py"
"""Beside the program that the demo traces."""
KILL_AFTER: Final = 3
"""Lines of the script's own, before its provider is killed."""
MAX_USD: Final = "0.01"
NOTE: Final = "p2pflop: "
"""What is not the script's own on its terminal begins with this."""


def run_plain_script(script: Path, market: Market) -> dict[str, Any]:
    """Run it in the cloud by the buyer's node, and natively at the same time; compare.

    Raises P2PFlopError if it fails, VerificationError if the two differ or nobody had to be killed.
    """
    from p2pflop.client import Client
    from p2pflop.kernels.classes import environment

    say(f"\nNow a plain tinygrad script, which knows nothing of p2pflop: CLOUD=1 python {script}")
    accounts = {node.account: node for node in market.providers}
    bare = {name: value for name, value in os.environ.items() if not _is_ours(name)}
    home = str(market.buyer.home.absolute())
    in_cloud = {"CLOUD": "1", "P2PFLOP_HOME": home, "CLOUD_MAX_USD": MAX_USD}
    with _run(script, bare | environment()) as native, _run(script, bare | in_cloud) as cloud:
        with Client(market.buyer.home) as client:
            lines, killed, successor = _watch(cloud, client, accounts)
        _check_end(cloud, script, lines)
        if not successor:
            raise VerificationError(f"{script} was over before its provider was killed")
        say(f"'{successor}' has finished what '{killed}' had begun; the script did not notice.")
        say("Waiting for the same script, run here by tinygrad alone...")
        local = list(_lines(native))
        _check_end(native, script, local)
    if local != lines:
        raise VerificationError(f"{script} printed {local} here, and {lines} in the cloud")
    say(f"The same {counted(len(lines), 'line')}, to the last digit.")
    return {"lines": lines, "killed": killed, "provider": successor}


def _is_ours(name: str) -> bool:
    return name == "DEV" or name.startswith("CLOUD")


def _watch(
    process: subprocess.Popen[str], client: Any, accounts: Mapping[str, DemoNode]
) -> tuple[list[str], str, str]:
    """Show what a script prints, and kill its provider on the way.

    The script's own lines, the name of who was killed, and of who was there last.
    """
    lines: list[str] = []
    killed = successor = ""
    for line in _lines(process):
        say(f"  {line}")
        if line.startswith(NOTE):
            continue
        lines.append(line)
        if len(lines) == KILL_AFTER:
            victim = _provider(client, accounts)
            victim.kill()
            killed = victim.name
            say(f"'{killed}' is killed now, with kill -9.")
        elif killed and not successor:
            successor = _provider(client, accounts).name
    return lines, killed, successor


def _provider(client: Any, accounts: Mapping[str, DemoNode]) -> DemoNode:
    """Who runs the one session of the buyer."""
    for card in client.status()["sessions"]:
        return accounts[card["account"]]
    raise VerificationError("the script has no session")


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    if process.stdout is not None:
        for line in process.stdout:
            yield line.rstrip("\n")


def _check_end(process: subprocess.Popen[str], script: Path, lines: Sequence[str]) -> None:
    code = process.wait()
    if code:
        raise P2PFlopError(f"{script} ended with {code}: {' '.join(lines[-2:])}")


@contextmanager
def _run(script: Path, variables: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A script in a process of its own, which ends with the block. Both its streams are one."""
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, str(script)],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
