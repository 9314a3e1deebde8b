"""The command ``p2pflop``: a table of commands, each imported only when it is called.

Every error ends here: one message and a hint on standard error and the exit code of its class. A
traceback is shown only with ``--debug``.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import click
from click.shell_completion import shell_complete

from p2pflop import __version__
from p2pflop.cli.output import Flags, print_error, print_traceback, print_warning, say
from p2pflop.errors import ConfigError, P2PFlopError, StoreFullError

PROGRAM: Final = "p2pflop"
COMPLETION: Final = "_P2PFLOP_COMPLETE"
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141

# name -> (module, one line of help). The line is repeated here so that `p2pflop --help` imports
# none of them; a test holds it to the command's own.
COMMANDS: Final = {
    "node": ("node", "Run a node: buy, and with --ask sell, compute."),
    "submit": ("submit", "Buy a job's run and follow it to its result."),
    "sweep": ("sweep", "Buy many runs of a job with other arguments, under one budget."),
    "trace": ("script", "Turn a script's job into a .p2pj file."),
    "run": ("script", "Run a Python script, on the market if it knows nothing of p2pflop."),
    "show": ("submit", "Show a job file or a run."),
    "jobs": ("runs", "List the runs of this node."),
    "watch": ("runs", "Follow a run: how it stands, and what comes from now on."),
    "cancel": ("runs", "Give a run up, and tell what it has cost."),
    "explain": ("explain", "Show why a run went to its provider."),
    "audit-tape": ("explain", "Find fills that were not the best deal."),
    "put": ("blobs", "Keep a file as a blob."),
    "get": ("blobs", "Fetch a blob by its hash."),
    "ls": ("blobs", "List the blobs of this node."),
    "rm": ("blobs", "Delete blobs from this node."),
    "book": ("market", "Show the order book."),
    "trades": ("tape", "Show what was traded."),
    "quote": ("quote", "Tell what a PFLOP costs you, and what to ask for it."),
    "peers": ("market", "List the connected peers."),
    "ledger": ("market", "Show who owes whom."),
    "statement": ("statement", "Show every entry with one account."),
    "pay": ("money", "Book money that you have paid, and tell who got it."),
    "payments": ("money", "List payments both ways."),
    "received": ("money", "Acknowledge money that you have received."),
    "refuse": ("money", "Refuse a claim: the money did not come."),
    "delegate": ("delegate", "Make the home of another box of this account."),
    "registry": ("registry", "Run a registry of franchises, enrol at one, or check one."),
    "doctor": ("doctor", "Check this machine and its node."),
    "demo": ("demo", "Train a digit classifier between four nodes on this machine."),
}

EPILOG: Final = """\b
Start:
  p2pflop demo                          see it all work on this machine
  p2pflop node --ask 0.05               sell compute at $0.05 a PFLOP
  p2pflop submit examples/digits.py     buy a training run

\b
Exit codes:
  0 done             1 other failure      2 bad setting, flag, file or machine
  3 home in use      4 no node answers    5 the job's own fault
  6 provider failed  7 no deal            8 blob store failed
  9 no such blob    10 hash or signature wrong  11 a peer broke the protocol
  12 disk full      130 interrupted

Every command has --json, --home, --debug and its own --help with examples.
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"p2pflop.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The table, without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """A market for compute: sell idle machines, run tinygrad programs where it is cheapest."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code. Errors are printed, not raised, but with --debug."""
    flags = Flags()
    try:
        return _invoke(arguments, flags)
    except click.ClickException as error:
        return _report_usage(error, as_json=flags.json or "--json" in arguments)
    except P2PFlopError as error:
        if flags.debug:
            raise
        fault = error
    except Exception as error:
        if flags.debug:
            raise
        fault = P2PFlopError(
            f"{type(error).__name__}: {error}",
            hint="This is a fault of p2pflop itself; --debug shows where. Please report it.",
        )
    with suppress(OSError):  # where it goes may be full too: then the exit code tells
        print_error(fault, as_json=flags.json)
    return fault.exit_code


def _invoke(arguments: Sequence[str], flags: Flags) -> int:
    # Not cli.main(): that turns Ctrl-C and a broken pipe into exit codes of its own.
    try:
        if instruction := os.environ.get(COMPLETION):
            return shell_complete(cli, {}, PROGRAM, COMPLETION, instruction)
        with cli.make_context(PROGRAM, list(arguments), obj=flags) as context:
            code = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        return _flushed(exit_.exit_code)
    except KeyboardInterrupt as interrupt:
        for note in getattr(interrupt, "__notes__", []):
            say(note)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return _reader_left()
    except OSError as error:
        raise _no_room(error) from error
    return code if isinstance(code, int) else 0


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_left()
    return code


def _reader_left() -> int:
    """Whoever read our output has gone."""
    _drop_output()
    return EXIT_BROKEN_PIPE


def _no_room(error: OSError) -> Exception:
    """What to raise for an error of the system's: where our output goes may be full."""
    from p2pflop.dht.files import NO_ROOM

    if error.errno not in NO_ROOM:
        return error
    _drop_output()
    return StoreFullError(
        f"there is no room for the output: {error.strerror}", hint="Free space, or write elsewhere."
    )


def _drop_output() -> None:
    """Without this, Python would complain of what it cannot flush at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


def _report_usage(error: click.ClickException, *, as_json: bool) -> int:
    if as_json:
        print_error(ConfigError(error.format_message()), as_json=True)
    else:
        error.show()
    return ConfigError.exit_code


def main() -> None:
    """The console script."""
    sys.excepthook, warnings.showwarning = print_traceback, print_warning
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
