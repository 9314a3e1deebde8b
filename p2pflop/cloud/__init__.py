"""Device ``CLOUD``: an unmodified tinygrad script computes on the market.

``CLOUD=1 python script.py``, ``p2pflop run --cloud script.py`` and ``import p2pflop.cloud`` as the
first line of a script are the same: importing this package serves device ``CLOUD`` to tinygrad and
makes it the default. It costs nothing until tinygrad is imported, which it needs not be yet.
"""

from __future__ import annotations

from p2pflop.cloud.hook import install

install()
