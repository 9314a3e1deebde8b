"""The built wheel works by itself: nothing of the repository around it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUBPACKAGES = ("cli", "dht", "franchise", "job", "kernels", "market", "node", "registry")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    copy = tmp_path_factory.mktemp("source") / "p2pflop"
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listing.stdout.splitlines():
        source, target = ROOT / name, copy / name
        if source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = out.glob("*.whl")
    return found


def test_the_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folders = {"p2pflop/dht": "dht", "p2pflop/kernels": "kernels", "p2pflop/node": "node"}
    for path in (ROOT / "p2pflop").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    for package, folder in folders.items():
        for path in (ROOT / folder).glob("*.py"):
            assert f"{package}/{path.name}" in names
    assert "p2pflop/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"p2pflop"}


def test_it_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import importlib, sys\n"
        f"for name in {SUBPACKAGES!r}:\n"
        "    module = importlib.import_module('p2pflop.' + name)\n"
        f"    assert module.__file__.startswith({str(site)!r}), module.__file__\n"
        "from p2pflop.cli.main import main\n"
        "import p2pflop.node.main\n"
        "sys.argv = ['p2pflop', '--help']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "p2pflop node --ask" in done.stdout
    assert list(empty.iterdir()) == []
