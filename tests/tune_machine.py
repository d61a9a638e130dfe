"""``normwise tune`` as one of several machines, with little patience and a target that takes its time."""

from __future__ import annotations

import time
from typing import Any

from normwise import cli
from normwise.experiments.tune import storage, study
from test_tune import planted


def slow(trial: Any) -> float:
    """A moment later."""
    time.sleep(0.2)
    return planted(trial)


if __name__ == "__main__":
    storage.BEAT, storage.GRACE, study._POLL = 1, 4, 0.2
    cli.command()
