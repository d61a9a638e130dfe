"""normwise: penalise, clip, project, normalise and steer any norm, of any block, of weights, gradients and updates, with any optimizer.

>>> import normwise as nw
>>> nw.attach(model, optimizer, [nw.max_norm(3.0), nw.clip_grad_norm(1.0)])     # the training loop stays as it was
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if os.path.basename((getattr(sys, "argv", None) or [""])[0]) in ("-m", "normwise", "normwise.exe", "normwise-script.py"):
    from normwise.experiments.framework.interrupts import watch_command  # Ctrl-C must not find torch half imported

    watch_command()

from normwise import norms as norms
from normwise.clipping import clip_grad_norm_ as clip_grad_norm_
from normwise.control import Control as Control
from normwise.control import attach as attach
from normwise.errors import DataError as DataError
from normwise.errors import LayoutError as LayoutError
from normwise.errors import MissingExtraError as MissingExtraError
from normwise.errors import NonFiniteError as NonFiniteError
from normwise.errors import NormError as NormError
from normwise.errors import NormwiseError as NormwiseError
from normwise.errors import OutputError as OutputError
from normwise.errors import PolicyError as PolicyError
from normwise.errors import StudyError as StudyError
from normwise.parameters.layouts import Layout as Layout
from normwise.parameters.layouts import register_layout as register_layout
from normwise.policy import NAMED
from normwise.policy import Policy as Policy
from normwise.policy import Rule as Rule
from normwise.policy import radii as radii
from normwise.policy import schedules as schedules

if TYPE_CHECKING:
    from normwise import checkpoints as checkpoints
    from normwise import integrations as integrations
    from normwise import optim as optim
    from normwise import prune as prune
    from normwise.advice import advise as advise
    from normwise.inspection import inspect as inspect
    from normwise.policy.named import *  # noqa: F403
    from normwise.policy.published import *  # noqa: F403
else:
    globals().update(NAMED)    # each named rule, as nw.max_norm: a list of them here would have to follow them by hand

__version__ = "0.2.0"


if not TYPE_CHECKING:    # for a type checker any name would exist, and the named rules would not be exported

    def __getattr__(name: str) -> Any:
        """``nw.optim``, ``nw.prune``, ``nw.inspect`` and the like: imported where they are first used, for rules need none."""
        if name in ("checkpoints", "integrations", "optim", "prune"):
            return import_module(f"normwise.{name}")
        if name in ("advise", "inspect"):
            return getattr(import_module("normwise.advice" if name == "advise" else "normwise.inspection"), name)
        raise AttributeError(f"module 'normwise' has no attribute {name!r}")

    __all__ = [
        "Control", "DataError", "Layout", "LayoutError", "MissingExtraError", "NonFiniteError", "NormError", "NormwiseError", "OutputError",
        "Policy", "PolicyError", "Rule", "StudyError", "advise", "attach", "checkpoints", "clip_grad_norm_", "inspect", "integrations",
        "norms", "optim", "prune", "radii", "register_layout", "schedules", *NAMED,
    ]  # fmt: skip
