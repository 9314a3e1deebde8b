"""What the documents say is so: commands, options, names, numbers, vectors and programs."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import click
import pytest
from tinygrad import Tensor

import p2pflop as pf
from p2pflop import errors
from p2pflop.cli.main import COMMANDS, EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, cli
from p2pflop.cloud import settings as cloud_settings
from p2pflop.franchise.records import LeafKind, RefusalReason, RevocationReason
from p2pflop.job import commands
from p2pflop.job.graph import Dtype, Op
from p2pflop.job.limits import DEFAULT_LIMITS
from p2pflop.job.meter import WEIGHTS
from p2pflop.market.gate import Outcome
from p2pflop.market.ranking import total_nusd
from p2pflop.market.sheets import make_ask
from p2pflop.node import (
    config,
    franchise_stream,
    messages,
    payment_stream,
    quote_stream,
    service,
    session_messages,
)
from p2pflop.node.api import create_app
from p2pflop.registry.api import RegistryApi

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("**/*.md"))
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "examples" / "README.md", ROOT / "tests" / "README.md"]
EXAMPLE_PAGES = [ROOT / "docs" / "examples" / f"{name}.md" for name in EXAMPLES]
RUNNING = [
    ROOT / "docs" / name for name in ("formats.md", "franchise.md", "market.md", "meter.md")
] + EXAMPLE_PAGES
REFERENCE = (ROOT / "docs" / "reference.md").read_text("utf-8")

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMON = {"--home", "--json", "--debug", "--help", "-h"}
CONTEXT = click.Context(cli)
OTHER_PROGRAMS = {"pip", "curl", "export", "jq", "tail", "."}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(path.read_text("utf-8")) if kind == language]


def section(title: str) -> str:
    """The text of reference.md below a heading of the second level."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"reference.md has no section {title}"
    return found.group(1)


def table_rows(text: str) -> list[list[str]]:
    """Cells of every table row of ``text`` without backquotes; heads and rules left out."""
    rows = []
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|") and not line.startswith("|--") and not following.startswith("|--"):
            rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


# Shell


def shell_commands(path: Path) -> Iterator[list[str]]:
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            command: list[str] = []
            for word in [*words, ";"]:
                if word in ("|", "&&", ";", "&"):
                    if command:
                        yield command
                    command = []
                elif command or "=" not in word:
                    command.append(word)


def options_of(command: click.Command) -> set[str]:
    """Of a group, those of all its commands."""
    own = {
        name
        for param in command.params
        if isinstance(param, click.Option) and not param.hidden
        for name in (*param.opts, *param.secondary_opts)
    }
    return own.union(*(options_of(inner) for inner in commands_of(command).values()))


def commands_of(command: click.Command) -> dict[str, click.Command]:
    if not isinstance(command, click.Group):
        return {}
    found = {name: command.get_command(CONTEXT, name) for name in command.list_commands(CONTEXT)}
    return {name: inner for name, inner in found.items() if inner is not None}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_shell_commands_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for words in shell_commands(path):
        program = words[0].rpartition("/")[2]
        if program == "p2pflop":
            command = cli.get_command(CONTEXT, words[1])
            assert command is not None, f"no command {words[1]}"
            if inner := commands_of(command):
                assert words[2] in inner, f"no command {words[1]} {words[2]}"
                command = inner[words[2]]
            given = {word.partition("=")[0] for word in words[2:] if re.match("--?[a-z]", word)}
            assert given <= options_of(command) | COMMON, words
        elif program == "make":
            for target in (word for word in words[1:] if "=" not in word):
                assert f"\n{target}:" in makefile, f"no target {target}"
        elif program.startswith("python") and not words[1].startswith("-"):
            assert (ROOT / words[1]).is_file(), words
        else:
            assert program in {"pip", "curl", "export", "jq", "tail", "."} or words[1] == "-m", (
                words
            )


def test_every_command_and_option_is_in_the_reference() -> None:
    text = section("Commands")
    parts = re.split(r"^### p2pflop ([\w-]+)\n", text, flags=re.MULTILINE)
    assert parts[1::2] == list(COMMANDS)
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        command = cli.get_command(CONTEXT, name)
        assert command is not None
        cells = (row[0] for row in table_rows(body))
        told = {option for cell in cells for option in re.findall(r"--?[a-z][a-z-]*", cell)}
        assert told == options_of(command) - COMMON, name
    common = (row[0].split()[0] for row in table_rows(parts[0]))
    assert set(common) == COMMON - {"-h"}


def test_every_command_of_the_registry_is_in_the_reference() -> None:
    registry = cli.get_command(CONTEXT, "registry")
    assert registry is not None
    part = section("Commands").split("\n### p2pflop registry\n")[1].split("\n### ")[0]
    commands, options = part.split("Options of these:")
    listed = {row[0].split()[0]: row for row in table_rows(commands)}
    found = commands_of(registry)
    assert list(listed) == list(found)
    for name, command in found.items():
        usage = command.collect_usage_pieces(click.Context(command))[1:]
        assert listed[name][0] == " ".join([name, *usage])
        assert listed[name][1] == command.get_short_help_str(200)
    told = {(row[0].split()[0], name) for row in table_rows(options) for name in row[1].split(", ")}
    assert told == {
        (option, name) for name, command in found.items() for option in options_of(command) - COMMON
    }


# Python


def pf_name(node: ast.AST) -> str | None:
    """``x`` where ``node`` is ``pf.x``."""
    if (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "pf"
    ):
        return node.attr
    return None


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_snippets_name_what_exists(path: Path) -> None:
    for code in blocks(path, "python"):
        for node in ast.walk(ast.parse(code)):
            name = pf_name(node)
            assert name is None or name in pf.__all__, f"no pf.{name}"
            callee = pf_name(node.func) if isinstance(node, ast.Call) else None
            if isinstance(node, ast.Call) and callee is not None:
                keywords = {keyword.arg for keyword in node.keywords}
                assert keywords <= set(inspect.signature(getattr(pf, callee)).parameters), callee


def test_the_readme_shows_real_attributes_of_runs_and_results() -> None:
    [code] = [code for code in blocks(ROOT / "README.md", "python") if "pf.trace" in code]
    result_names = set(dir(pf.Result)) | {"hash", "cost_nusd", "record"}
    known = {"job": dir(pf.Job), "run": [*dir(pf.Run), "id"], "result": result_names}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = known.get(node.value.id)
            assert names is None or node.attr in names, f"{node.value.id}.{node.attr}"


def test_the_sdk_in_the_reference_has_the_real_signatures() -> None:
    rows = table_rows(section("Python"))
    functions = [row[0] for row in rows if row[0].startswith("pf.")]
    told = {text[3:].partition("(")[0]: text for text in functions}
    assert set(told) == {name for name in pf.__all__ if name.islower() and name[0] != "_"}
    for name, text in told.items():
        named = getattr(pf, name)
        assert text == f"pf.{name}{plain_signature(named) if callable(named) else ''}"
    listed = [row[0] for row in rows if re.fullmatch(r"\w+\(.*\)", row[0])]
    found = 0
    for kind in (pf.Job, pf.Run, pf.Result):
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                text = plain_signature(method).replace("(self, ", "(").replace("(self)", "()")
                assert f"{name}{text}" in listed, name
                found += 1
    assert found == len(listed)


def plain_signature(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [
        value.replace(annotation=inspect.Parameter.empty) for value in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return text.replace("'", '"')


@pytest.mark.parametrize("path", RUNNING, ids=name_of)
def test_vectors_are_what_the_code_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every Python block in order, in one program; a text block after one is what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    for name in EXAMPLES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    fences = FENCE.findall(path.read_text("utf-8"))
    program = tmp_path / "page.py"
    mark = "\x00"
    codes = [f"print({mark!r})\n{body}" for kind, body in fences if kind == "python"]
    program.write_text("\n".join(codes), "utf-8")
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(program))
    for name in EXAMPLES:
        sys.modules.pop(name, None)
    outputs = iter(printed.getvalue().split(mark)[1:])
    compared = 0
    for (kind, _), (following, told) in zip(fences, [*fences[1:], ("", "")], strict=True):
        if kind != "python":
            continue
        output = next(outputs)
        assert not output.strip() or following == "text", f"{path.name} hides {output[:80]!r}"
        if output.strip():
            assert "".join(told.split()) == "".join(output.split())
            compared += 1
    assert compared >= (1 if path in EXAMPLE_PAGES else 3)


def test_tables_of_numbers_are_the_codes_own() -> None:
    def pairs(page: str, title: str) -> dict[str, int]:
        text = (ROOT / "docs" / page).read_text("utf-8").split(f"\n{title}\n")[1]
        rows = table_rows(text.split("\n#")[0])
        cells = [cell for row in rows for cell in row]
        found = zip(cells[::2], cells[1::2], strict=True)
        return {
            max(pair, key=str.isupper): int(min(pair, key=str.isupper)) for pair in found if pair[0]
        }

    assert pairs("formats.md", "### Dtypes") == {each.name: int(each) for each in Dtype}
    assert pairs("formats.md", "### Operations") == {each.name: int(each) for each in Op}
    weights = {each.name: weight for each, weight in WEIGHTS.items() if weight != 1}
    assert pairs("meter.md", "## FLOP") == weights


@pytest.mark.parametrize(
    ("title", "module"),
    [
        ("## The job stream", messages),
        ("## The session stream", session_messages),
        ("## Sessions", commands),
        ("## Quotes", quote_stream),
        ("## Payments", payment_stream),
        ("## Registries, between nodes", franchise_stream),
    ],
)
def test_messages_of_a_stream_are_listed(title: str, module: ModuleType) -> None:
    text = (ROOT / "docs" / "formats.md").read_text("utf-8").split(title)[1].split("\n## ")[0]
    told = {row[1]: (int(row[0]), row[2]) for row in table_rows(text)}
    found = {}
    for name, kind in vars(module).items():
        tag = getattr(getattr(kind, "__struct_config__", None), "tag", None)
        if tag is not None and not (module is commands and issubclass(kind, commands.Frame)):
            found[name] = (tag, ", ".join(kind.__struct_fields__) or "none")
    assert told == found


def test_kinds_of_leaves_and_their_reasons_are_listed() -> None:
    text = (ROOT / "docs" / "formats.md").read_text("utf-8").split("A **leaf**")[1]
    leaves, reasons = text.split("\nReasons of a refusal:")
    told = {row[1]: int(row[0]) for row in table_rows(leaves)}
    assert told == {each.name: int(each) for each in LeafKind}
    refusals, revocations = reasons.split("\nThe tree is")[0].split("Of a revocation:")
    for part, kind in ((refusals, RefusalReason), (revocations, RevocationReason)):
        found = {name: int(number) for number, name in re.findall(r"(\d) `(\w+)`", part)}
        assert found == {each.name: int(each) for each in kind}


@pytest.mark.parametrize(
    ("title", "elsewhere"),
    [
        ("## Gossip", {Outcome.ACCOUNT, Outcome.TAPE}),
        ("## The tape", {Outcome.LATER, Outcome.BOOK}),
    ],
)
def test_what_becomes_of_gossip_is_listed(title: str, elsewhere: set[Outcome]) -> None:
    text = (ROOT / "docs" / "market.md").read_text("utf-8").split(title)[1].split("\n## ")[0]
    rows = [row for row in table_rows(text) if row[2] in ("", "yes")]
    told = {each for row in rows for each in row[1].split(", ")}
    good = {Outcome.NEW, Outcome.PROOF}
    assert told == {each.value for each in set(Outcome) - good - elsewhere}


# Exit codes, settings, routes, events, limits


def error_tree(kind: type[errors.P2PFlopError]) -> Iterator[type[errors.P2PFlopError]]:
    yield kind
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from error_tree(below)


def test_exit_codes_are_those_of_the_errors() -> None:
    rows = table_rows(section("Exit codes"))
    told = {row[1]: int(row[0]) for row in rows if row[1]}
    assert told == {kind.__name__: kind.exit_code for kind in error_tree(errors.P2PFlopError)}
    others = {int(row[0]) for row in rows if not row[1]}
    assert others == {0, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE}


def test_troubles_have_codes_that_exist() -> None:
    page = (ROOT / "docs" / "how-to.md").read_text("utf-8").split("## Get out of trouble")[1]
    codes = {kind.exit_code for kind in error_tree(errors.P2PFlopError)}
    rows = table_rows(page)
    assert len(rows) > 20
    assert {int(row[1]) for row in rows} <= codes


def test_every_setting_is_in_the_reference(tmp_path: Path) -> None:
    rows = table_rows(section("Settings"))
    amounts = {field: key for key, field in (config._AMOUNTS | config._NAMES).items()}
    fields = set(config.Settings.__dataclass_fields__) - {"home"}
    assert {row[0] for row in rows} == {amounts.get(field, field) for field in fields}
    node = cli.get_command(CONTEXT, "node")
    assert node is not None
    assert {row[1] for row in rows if row[1]} == options_of(node) - {"--home", "--help"}


def test_the_settings_of_the_cloud_are_its_own() -> None:
    page = (ROOT / "docs" / "cloud.md").read_text("utf-8")
    rows = table_rows(page.split("## Settings")[1].split("\n## ")[0])
    told = {name: default for name, default, _ in rows}
    code = Path(cloud_settings.__file__).read_text("utf-8")
    assert set(told) == {cloud_settings.SWITCH, *re.findall(r'"(CLOUD_\w+)"', code)}
    given = {name: text for name, text in told.items() if re.search(r"\d", text)}
    assert len(given) == 6
    assert cloud_settings.read_settings(given) == cloud_settings.CloudSettings()
    assert not cloud_settings.is_wanted({})


def test_every_route_is_in_the_reference() -> None:
    told = {row[0] for row in table_rows(section("HTTP"))}
    app = create_app(MagicMock(), "token", 7420)
    served = {
        f"{method} {route.path}"  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods - ({"HEAD"} if "/v1/" in route.path else set())  # type: ignore[attr-defined]
    }
    assert told == served


def test_every_route_of_the_registry_is_in_the_reference() -> None:
    told = {row[0] for row in table_rows(section("HTTP of a registry"))}
    routes = RegistryApi(MagicMock(), behind_proxy=False).routes()
    assert told == {
        f"{method} {route.path}"
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }


def test_reasons_of_the_registry_are_listed() -> None:
    page = (
        (ROOT / "docs" / "registry.md").read_text("utf-8").split("## Revoke")[1].split("\n## ")[0]
    )
    revocations, refusals = page.split("those of a refusal are")
    for text, kind in ((revocations, RevocationReason), (refusals, RefusalReason)):
        named = re.findall(r"`([a-z_]+)`", text.split("```")[-1])
        assert named == [each.name.lower() for each in kind]


def test_every_kind_of_event_is_in_the_reference() -> None:
    told = {row[0] for row in table_rows(section("Events of a run"))}
    table = re.split(r"^=+ =+\n", service.__doc__ or "", flags=re.MULTILINE)[2]
    assert told == set(re.findall(r"^``(\w+)``", table, re.MULTILINE))


UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "s": 1, "bytes": 1}


def test_limits_have_the_values_that_the_reference_says() -> None:
    named, fields = section("Limits").split("On a graph from a stranger")
    rows = table_rows(named)
    assert len(rows) > 20
    for name, value, module, _ in rows:
        number, _, unit = value.partition(" ")
        scale = 10**9 if name.endswith("_NS") else UNITS[unit]
        expected = getattr(importlib.import_module(module), name)
        assert int(number.replace(",", "")) * scale == expected, name
    told = {}
    for name, value, _ in table_rows(fields):
        base, _, power = value.replace(",", "").partition("^")
        told[name] = int(base) ** int(power or 1)
    assert told == asdict(DEFAULT_LIMITS)


# Programs and links


def test_the_tutorial_shows_the_program_that_it_runs() -> None:
    code = (ROOT / "examples" / "first.py").read_text("utf-8")
    assert code in blocks(ROOT / "docs" / "tutorial.md", "python")


def test_the_tutorials_program_learns() -> None:
    """Traced and run as the last step of the tutorial does it, without a node."""
    job = runpy.run_path(str(ROOT / "examples" / "first.py"))["job"]
    rows: list[pf.Row] = []
    result = job.run_local(on_row=rows.append)
    result.verify()
    assert [row["step"] for row in rows if "acc" in row] == [99, 199, 299]
    assert result["acc"][-1] > 0.9
    assert result.state["layer.weight"].shape == (10, 64)


@pytest.mark.slow
def test_the_tutorials_program_runs_as_it_is_typed(tmp_path: Path) -> None:
    """In a process of its own, which starts an embedded node; that one is ended by its id."""
    home = tmp_path / "home"
    environment = os.environ | {"P2PFLOP_HOME": str(home), "CC": "/bin/false"}
    command = [sys.executable, str(ROOT / "examples" / "first.py")]
    try:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
        )
    finally:
        if (home / "node.json").exists():
            os.kill(json.loads((home / "node.json").read_text())["pid"], signal.SIGINT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("(")[0] for line in lines[:4]] == ["Job", "Row", "Row", "Row"]
    assert [line.split()[0] for line in lines[4:]] == ["result", "cost", "weight"]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_within_pages_lead_to_headings(path: Path) -> None:
    text = path.read_text("utf-8")
    for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        target = (path.parent / file).read_text("utf-8") if file else text
        headings = {slug(line) for line in re.findall(r"^#+ (.+)$", target, re.MULTILINE)}
        assert anchor in headings, f"{path.name} links to #{anchor}"


def test_the_index_lists_every_page() -> None:
    for folder in (ROOT / "docs", ROOT / "docs" / "examples"):
        index = (folder / "README.md").read_text("utf-8")
        for path in DOCS:
            if path.parent == folder and path.name != "README.md":
                assert f"]({path.name})" in index, path.name
    assert "](examples/README.md)" in (ROOT / "docs" / "README.md").read_text("utf-8")


# Pages of the examples

HEADINGS = [
    "The part worth reading",
    "Run it",
    "What one sees",
    "Size and cost",
    "Beside native tinygrad",
    "Make it yours",
]


def test_each_example_has_a_page_and_each_page_an_example() -> None:
    folder = ROOT / "docs" / "examples"
    assert {path.stem for path in folder.glob("*.md")} == {*EXAMPLES, "README"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_of_an_example_has_its_numbers(name: str) -> None:
    page = (ROOT / "docs" / "examples" / f"{name}.md").read_text("utf-8")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == HEADINGS
    assert f"python examples/{name}.py\np2pflop submit examples/{name}.py" in page
    Tensor.manual_seed(0)  # as in a new process: where the random counter starts is in the job
    module = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    job = module["make_job"]() if "make_job" in module else module["job"]
    assert f"The job is {job.size_bytes:,} bytes." in page
    size = f"{job.size_bytes / 1000:.1f} kB"
    index = (ROOT / "docs" / "examples" / "README.md").read_text("utf-8")
    assert f"| [{name}]({name}.md) | {size} |" in index
    *phases, [_, _, total] = table_rows(page.split("## Size and cost")[1])
    told = [(times, flop) for _, times, flop in phases]
    assert told == [(f"{line.times:,}", f"{line.flop:,}") for line in job.cost.lines]
    assert total == f"{job.cost.flop:,}"
    ask = make_ask(0, bytes(32), 50_000_000, 0, memory_bytes=0, flop_per_s=0)
    price = total_nusd(ask, job.cost.flop, job.cost.touched_bytes, 0)
    assert f"makes that ${price / 10**9:.9f}." in page
