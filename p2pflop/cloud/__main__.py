"""``python -m p2pflop.cloud script.py args``: the script on device ``CLOUD``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script of the command line as ``__main__``, as python itself would."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m p2pflop.cloud SCRIPT [ARGUMENTS]")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent.absolute())
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
