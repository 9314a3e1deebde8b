"""``p2pflop trace`` and ``run``, and the one rule by which a script's job is found.

A script that is given to ``trace`` or ``submit`` is imported, not run as ``__main__``: what it
keeps under ``if __name__ == "__main__":`` does not happen. It offers its job as a function
``make_job()`` without parameters that returns ``pf.trace(...)``, or as a variable ``job``.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from p2pflop.cli.output import Flags, common_options, print_json, say
from p2pflop.errors import ConfigError, JobError, P2PFlopError
from p2pflop.units import counted, format_bytes

if TYPE_CHECKING:
    from p2pflop.sdk import Job

MODULE_NAME: Final = "p2pflop_job"
HOW: Final = "Define 'def make_job(): return pf.trace(...)', or a variable 'job'."


@click.command("trace")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write here [default: *.p2pj].")
@common_options
@click.pass_obj
def trace_command(flags: Flags, script: Path, arguments: tuple[str, ...], out: Path | None) -> None:
    """Turn a script's job into a .p2pj file.

    The script is imported, not run as __main__, and offers its job as a function make_job() that
    takes nothing and returns pf.trace(...), or as a variable named job. ARGUMENTS are its sys.argv.
    Input data goes into the folder OUT.inputs beside the file. What the job costs is told, and, if
    a node runs, its quote by the book of now; none is started for that.

    \b
    Examples:
      p2pflop trace examples/digits.py -o digits.p2pj
      p2pflop trace train.py -- --lr 0.001
      p2pflop show digits.p2pj
    """
    from p2pflop.cli.describe import describe_meter, describe_quote, meter_lines, quote_lines

    job = job_from_script(script, arguments)
    target = job.save(out or script.with_suffix(".p2pj"))
    about, quote = describe_meter(job), describe_quote(flags, job)
    if flags.json:
        print_json({"path": str(target), "bytes": job.size_bytes, **about, **quote})
        return
    click.echo(str(target))
    say(f"{format_bytes(job.size_bytes)}, {counted(job.steps, 'step')}")
    for line in [*meter_lines(about), "", *quote_lines(quote)]:
        say(line)


@click.command(
    "run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option(
    "--cloud/--local",
    default=None,
    help="Compute on the market, as with CLOUD=1, or here [default: by what it imports].",
)
@common_options
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run_command(flags: Flags, cloud: bool | None, script: Path, arguments: tuple[str, ...]) -> None:
    """Run a Python script, on the market if it knows nothing of p2pflop.

    A script that does not import p2pflop computes at the best provider, as with CLOUD=1. One that
    does runs here: P2PFLOP_HOME, tinygrad's device and compiler are set as a provider sets them, so
    that a local run computes what a provider's run computes. CLOUD=0 and --local keep any script
    here. The exit code is the script's.

    \b
    Examples:
      p2pflop run examples/digits.py
      p2pflop run --home /tmp/home train.py --epochs 3
      p2pflop run --local train.py
    """
    from p2pflop.cloud.settings import SWITCH, is_wanted

    if not script.is_file():
        raise ConfigError(f"{script} is not a file")
    if cloud is None:
        cloud = is_wanted(os.environ) if SWITCH in os.environ else not imports_p2pflop(script)
    environment = os.environ | ({SWITCH: "1"} if cloud else {SWITCH: "0"} | compute_environment())
    if flags.home is not None:
        environment["P2PFLOP_HOME"] = str(flags.home.absolute())
    sys.stdout.flush()
    sys.stderr.flush()
    through = ["-m", "p2pflop.cloud"] if cloud else []
    command = [sys.executable, *through, str(script), *arguments]
    # Running the user's own script is the point, and there is no shell in between.
    os.execve(sys.executable, command, environment)  # noqa: S606


def imports_p2pflop(script: Path) -> bool:
    """Whether the script itself does. One that cannot be parsed runs where its error is told."""
    try:
        tree = ast.parse(script.read_bytes())
    except (SyntaxError, ValueError):
        return True
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return any(name.partition(".")[0] == "p2pflop" for name in names)


def compute_environment() -> dict[str, str]:
    """What tinygrad must find set to compute as this machine's class does. Raises ConfigError."""
    from p2pflop.kernels.classes import clang, environment

    folders = (str(Path(clang()).parent), os.environ.get("PATH", os.defpath))
    return {**environment(), "PATH": os.pathsep.join(folders)}


def job_from_script(script: Path, arguments: tuple[str, ...] = ()) -> Job:
    """The job that ``script`` offers; see the head of this module. Raises JobError, ConfigError."""
    from p2pflop.sdk import Job

    if not script.is_file():
        raise ConfigError(f"{script} is not a file")
    spec = importlib.util.spec_from_file_location(MODULE_NAME, script)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{script} is not a Python script", hint="Give a .py or .p2pj file.")
    try:
        os.environ.update(compute_environment())
    except ConfigError as error:
        # Tracing computes nothing; a script that realizes tensors will say what it lacks.
        say(f"note: {error.message}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE_NAME] = module
    sys.path.insert(0, str(script.parent.absolute()))
    sys.argv = [str(script), *arguments]
    try:
        spec.loader.exec_module(module)
        make_job = getattr(module, "make_job", None)
        job = make_job() if callable(make_job) else getattr(module, "job", None)
    except P2PFlopError:
        raise
    except SystemExit as error:
        raise JobError(
            f"{script} ended itself: sys.exit({error.code!r:.80})",
            hint="It is imported: keep what runs it under if __name__ == '__main__'.",
        ) from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = script.parent.resolve()
        lines = [
            f"{script if path == script.resolve() else path}:{frame.lineno}"
            for frame in frames
            if (path := Path(frame.filename).resolve()).parent == own
        ]
        place = lines[-1] if lines else str(script)
        raise JobError(
            f"{place}: {type(error).__name__}: {error}", hint="--debug shows the whole traceback."
        ) from error
    if not isinstance(job, Job):
        raise JobError(f"{script} offers no job", hint=HOW)
    return job
