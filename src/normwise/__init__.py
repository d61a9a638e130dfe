"""normwise: penalise, clip, project, normalise and steer any norm, of any block, of weights, gradients and updates, with any optimizer.

>>> import normwise as nw
>>> nw.attach(model, optimizer, [nw.max_norm(3.0), nw.clip_grad_norm(1.0)])     # the training loop stays as it was
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if os.path.basename((getattr(sys, "argv", None) or [""])[0]) in ("-m", "normwise", "normwise.exe", "normwise-script.py"):
    from normwise.experiments.framework.interrupts import watch_command  # Ctrl-C must not find torch half imported

    watch_command()

from normwise import norms
from normwise.clipping import clip_grad_norm_
from normwise.control import Control, attach
from normwise.errors import DataError, LayoutError, NonFiniteError, NormError, NormwiseError, PolicyError, StudyError
from normwise.parameters.layouts import Layout, register_layout
from normwise.policy import Policy, Rule, radii, schedules
from normwise.policy.named import (
    agc,
    clip_grad_norm,
    clip_grad_value,
    clip_weight_norm,
    clip_weight_value,
    decay_to_init,
    elastic_net,
    group_lasso,
    l1_ball,
    l1_penalty,
    l1_prox,
    l2_penalty,
    max_norm,
    min_max_norm,
    non_negative,
    normalize_grad,
    nuclear_prox,
    spectral_cap,
    spectral_normalize,
    unit_norm,
    weight_decay,
)
from normwise.policy.published import (
    autoclip,
    cpr,
    hyperball,
    orthogonal,
    orthogonal_penalty,
    qk_clip,
    radial_brake,
    relative_update,
    zclip,
)

if TYPE_CHECKING:
    from types import ModuleType

    from normwise import optim

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """``nw.optim`` is imported where it is first used: attaching rules needs none of it."""
    if name == "optim":
        return import_module("normwise.optim")
    raise AttributeError(f"module 'normwise' has no attribute {name!r}")



__all__ = [
    "Control",
    "DataError",
    "Layout",
    "LayoutError",
    "NonFiniteError",
    "NormError",
    "NormwiseError",
    "Policy",
    "PolicyError",
    "Rule",
    "StudyError",
    "agc",
    "attach",
    "autoclip",
    "clip_grad_norm",
    "clip_grad_norm_",
    "clip_grad_value",
    "clip_weight_norm",
    "clip_weight_value",
    "cpr",
    "decay_to_init",
    "elastic_net",
    "group_lasso",
    "hyperball",
    "l1_ball",
    "l1_penalty",
    "l1_prox",
    "l2_penalty",
    "max_norm",
    "min_max_norm",
    "non_negative",
    "normalize_grad",
    "norms",
    "nuclear_prox",
    "optim",
    "orthogonal",
    "orthogonal_penalty",
    "qk_clip",
    "radial_brake",
    "radii",
    "register_layout",
    "relative_update",
    "schedules",
    "spectral_cap",
    "spectral_normalize",
    "unit_norm",
    "weight_decay",
    "zclip",
]  # fmt: skip
