"""The command line with budgets of seconds, to be struck while it works: ``python strike_command.py compare cnn --budget quick ...``."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from normwise import cli
from normwise.experiments.compare import study as compare
from normwise.experiments.gan import study as gan
from normwise.experiments.prune import study as prune
from normwise.experiments.race import protocol
from normwise.experiments.tasks.fidelity import train_judge

COMMANDS = {
    "compare": "compare cnn --budget quick --only l2,adam --seeds 2 --workers 2",
    "race": "race lstm --tiny --budget quick --only muon --seeds 2 --workers 2",
    "gan": "gan --budget quick --only clip_value --seeds 2 --workers 2",
    "prune": "prune cnn --budget quick --seeds 2 --workers 2",
}


def shorten(put: Callable[[Any, str, Any], None] = setattr, put_item: Callable[[Any, str, Any], None] = dict.__setitem__) -> None:
    """Every budget called quick."""
    put(compare, "BUDGETS", {"quick": compare.Budget(9, 0.04, 2, 1)})
    micro = protocol.Budget(trials=2, seeds=2, doublings=0, scale=0.01, contenders=("muon",), rounds=1)
    put_item(protocol.PROTOCOLS[protocol.PROTOCOL].budgets, "quick", micro)
    put(protocol, "RATIO", 0.5)
    put(gan, "BUDGETS", {"quick": gan.Budget(9, 2, 4, 16, 4, 2, 40, 1, None, ("hinge",))})
    put(gan, "train_judge", partial(train_judge, epochs=2))
    put(prune, "BUDGETS", {"quick": {"cnn": prune.Budget(40, 4, 1, "tiny")}})
    put(prune, "RATES", (0.03, 0.1))
    put(prune, "_WIDENINGS", 0)
    put(prune, "STRENGTHS", {"cnn": (1e-3, 1e-2)})


if __name__ == "__main__":
    shorten()
    if "SLOWLY" in os.environ:    # so that a study can be met at its work
        prune.BUDGETS["quick"] = {"cnn": prune.Budget(100_000, 4, 1, "tiny")}
        compare.BUDGETS["quick"] = compare.Budget(9, 0.1, 2, 1)
    cli.command()
