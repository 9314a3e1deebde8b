"""What the commands print: tables, JSON, errors; and nothing that a peer could play with.

Results go to standard output, everything else to standard error, so that a pipe gets the result
alone. Text that came from a peer passes ``clean``, since a terminal obeys control characters.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TextIO, TypeVar

import click

from p2pflop.errors import P2PFlopError
from p2pflop.units import NS_PER_S

if TYPE_CHECKING:
    from p2pflop.client import Client

MAX_TEXT_CHARS: Final = 500

_NUMBER: Final = re.compile(r"-?\$?[\d,.]+(?:/\d+|/PFLOP)?(?: [A-Za-z/]{1,8})?")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class Flags:
    """The options that every command has."""

    home: Path | None = None
    json: bool = False
    debug: bool = False

    def client(self, *, start: bool = False) -> Client:
        """A client of the node of the chosen home; ``start`` an embedded one where none runs."""
        from p2pflop.client import Client

        return Client(self.home, start=start)


def common_options(command: Callable[P, R]) -> Callable[P, R]:
    """Adds ``--home``, ``--json`` and ``--debug``, which set the command's ``Flags``."""
    for declare in (
        click.option(
            "--debug",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_remember,
            help="Show the traceback of an error.",
        ),
        click.option(
            "--json",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_remember,
            help="Print JSON, errors too.",
        ),
        click.option(
            "--home",
            type=click.Path(path_type=Path, file_okay=False),
            is_eager=True,
            expose_value=False,
            callback=_remember,
            help="The node's home [default: $P2PFLOP_HOME or your data folder].",
        ),
    ):
        command = declare(command)
    return command


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    if value and parameter.name is not None:
        setattr(context.ensure_object(Flags), parameter.name, value)
    return value


def clean(text: object) -> str:
    """``text`` on one line, without control or direction characters, of bounded length."""
    return visible(str(text)[:MAX_TEXT_CHARS]).replace("\n", " ").strip()


def visible(text: str) -> str:
    """``text`` without what a terminal would obey, but for the ends of its lines."""
    return "".join(
        char
        if char.isprintable() or char == "\n"
        else " "
        if char.isspace()
        else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )


def print_json(value: Any) -> None:
    """``value`` as one line of JSON."""
    click.echo(json.dumps(value, separators=(", ", ": ")))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Aligned columns, numbers to the right; ``empty`` where there are no rows."""
    for line in table_lines(header, rows) or [empty]:
        click.echo(line)


def table_lines(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table, header first; none without rows."""
    cells = [[clean(cell) for cell in row] for row in rows]
    if not cells:
        return []
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    to_right = [all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(row: Sequence[str]) -> str:
        parts = zip(row, widths, to_right, strict=True)
        return "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in parts
        ).rstrip()

    return [line(header), *map(line, cells)]


def _is_number(cell: str) -> bool:
    return not cell or _NUMBER.fullmatch(cell) is not None


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """``name  value`` lines, aligned."""
    for line in field_lines(fields):
        click.echo(line)


def field_lines(fields: Iterable[tuple[str, object]]) -> list[str]:
    """The lines of ``print_fields``."""
    pairs = [(name, clean(value)) for name, value in fields]
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in pairs]


def say(text: str) -> None:
    """A remark for the person at the terminal."""
    click.echo(visible(text), err=True)


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What ``sys.excepthook`` does, for errors whose text may be a stranger's."""
    click.echo(visible("".join(traceback.format_exception(kind, error, trace))), err=True, nl=False)


def print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What ``warnings.showwarning`` does, likewise."""
    text = warnings.formatwarning(message, category, filename, lineno, line)
    click.echo(visible(text), file=file or sys.stderr, nl=False)


def print_error(error: P2PFlopError, *, as_json: bool) -> None:
    """``error`` and what to do about it, on standard error."""
    if as_json:
        told = {
            "kind": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "exit_code": error.exit_code,
        }
        print(json.dumps({"error": told}), file=sys.stderr)
        return
    click.echo(f"{click.style('error:', fg='red')} {clean(error.message)}", err=True)
    if error.hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {clean(error.hint)}", err=True)


def local_time(at_ns: int) -> str:
    """A time of the Unix clock, for a person here."""
    return datetime.fromtimestamp(at_ns / NS_PER_S).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def avoided_line(until_ns: int, failures: int) -> str:
    """Why an account is left alone, and until when by the clock on the wall here."""
    until = datetime.fromtimestamp(until_ns / NS_PER_S).astimezone()
    often = "once" if failures == 1 else f"{failures} times in a row"
    return f"avoided until {until:%H:%M}: it failed {often}"


def short(identifier: str) -> str:
    """Enough of a hash or peer id to recognise it: all Ed25519 peer ids begin alike."""
    text = clean(identifier)
    return f"..{text[-10:]}" if text.startswith("12D3KooW") else text[:12]
