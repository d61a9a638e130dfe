"""``python -m normwise``: the same command line as ``normwise``."""

from __future__ import annotations

import sys

from normwise.cli import main

if __name__ == "__main__":
    sys.exit(main())
