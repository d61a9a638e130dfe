"""``python -m normwise``: the same command line as ``normwise``."""

from __future__ import annotations

from normwise.cli import command

if __name__ == "__main__":
    command()
