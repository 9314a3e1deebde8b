"""The house's rules as tests: what a reviewer would otherwise have to remember."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"p2pflop": "p2pflop", "p2pflop.dht": "dht", "p2pflop.kernels": "kernels"} | {
    "p2pflop.node": "node"
}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70
PURE = ("p2pflop/franchise", "p2pflop/job", "p2pflop/market")
PURE_FILES = ("errors.py", "ids.py", "keys.py", "units.py", "wire.py")


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks; of an unpacked archive, all."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert listing.returncode == 0, listing.stderr
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


SOURCES = [path for path in tracked("*.py") if "vendor" not in path.parts]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_subpackage_is_packaged() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    listed = set(config["tool"]["setuptools"]["packages"])
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            if package == "p2pflop" and inner and inner[0] in {"dht", "kernels", "node"}:
                continue
            found.add(".".join((package, *inner)))
    assert listed == found


@pytest.mark.parametrize("name", ["dht", "kernels", "node"])
def test_links_lead_to_the_top_folders(name: str) -> None:
    link = ROOT / "p2pflop" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MAX_FILE_LINES
    for function in functions(path):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"


def test_pure_floors_do_no_io() -> None:
    banned = {"open", "print", "input", "eval", "exec"}
    modules = {"time", "random", "datetime", "os", "socket", "pathlib", "trio", "sqlite3"}
    pure = [ROOT / "p2pflop" / name for name in PURE_FILES]
    pure += [path for path in SOURCES if str(path.relative_to(ROOT)).startswith(PURE)]
    for path in pure:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in banned, f"{path}:{node.lineno} calls {node.func.id}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    {alias.name for alias in node.names}
                    if isinstance(node, ast.Import)
                    else {node.module or ""}
                )
                assert not {name.split(".")[0] for name in names} & modules, f"{path}:{node.lineno}"


def test_test_files_have_distinct_names() -> None:
    names = [path.name for path in tracked("tests/*.py", "tests/**/*.py") if "test_" in path.name]
    assert len(names) == len(set(names))


def test_every_dependency_is_explained() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    project = config["project"]
    extras = [item for extra in project["optional-dependencies"].values() for item in extra]
    explained = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    for requirement in [*project["dependencies"], *extras]:
        name = re.split(r"[\[<>=;! ]", requirement)[0]
        assert f"`{name}`" in explained, f"docs/dependencies.md does not explain {name}"


def test_links_in_documents_exist() -> None:
    for path in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_readme_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.index("make demo") < text.index("make test") < 1200
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for command in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{command}:" in makefile


def test_no_trace_of_one_machine() -> None:
    for path in tracked("*.py", "*.md", "*.toml", "Makefile", ".ci/run"):
        text = path.read_text("utf-8")
        for trace in (str(ROOT), str(Path.home()) + "/"):
            assert trace not in text, f"{path} names {trace}"
