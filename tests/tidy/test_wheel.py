"""The built wheel works by itself: nothing of the repository around it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUBPACKAGES = ("cli", "cloud", "dht", "franchise", "job", "kernels", "market", "node", "registry")


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
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"p2pflop", "p2pflop_cloud.pth"}


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


CLOUD_CODE = """
import sys
found = [type(finder).__module__ for finder in sys.meta_path]
print("p2pflop.cloud.hook" in found, "p2pflop" in sys.modules, "tinygrad" in sys.modules)
"""


@pytest.mark.parametrize(("value", "told"), [("", "False"), ("0", "False"), ("1", "True")])
def test_the_wheel_hears_cloud(wheel: Path, tmp_path: Path, value: str, told: str) -> None:
    """Python runs the line in the wheel's .pth file: nothing happens unless CLOUD is set."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"import site, sys; site.addsitedir({str(tmp_path)!r})\n{CLOUD_CODE}"
    done = _isolated(code, value)
    assert done.stdout.split() == [told, told, "False"], done.stderr


@pytest.mark.parametrize(("value", "told"), [("", "False"), ("1", "True")])
def test_an_editable_installation_hears_cloud(value: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOUD_CODE],
        env=os.environ | {"CLOUD": value},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [told, told, "False"], done.stderr


def test_without_cloud_the_line_costs_nothing() -> None:
    line = (ROOT / "p2pflop_cloud.pth").read_text()
    code = (
        "import timeit\n"
        f"line = compile({line!r}, 'pth', 'exec')\n"
        "print(min(timeit.repeat(lambda: exec(line), number=1, repeat=20)))\n"
    )
    taken_s = float(_isolated(code, "").stdout)
    assert taken_s < 0.001


def _isolated(code: str, value: str) -> subprocess.CompletedProcess[str]:
    """``code`` run by a Python that sees no folder of packages but what the code adds."""
    packages = [entry for entry in sys.path if "site-packages" in entry]
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {packages!r}\n{code}"],
        env=os.environ | {"CLOUD": value},
        capture_output=True,
        text=True,
    )
