"""Lightning: a callback that a module trains under.

>>> rules = nw.integrations.lightning.NormwiseCallback([nw.max_norm(3.0)])
>>> lightning.Trainer(callbacks=[rules]).fit(module, data)
>>> print(rules.control.verify())
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from normwise.control import Control, attach
from normwise.engine.nonfinite import OnNonFinite
from normwise.errors import PolicyError, need_version
from normwise.integrations.own_clipping import replaced
from normwise.policy import Policy

_PACKAGE = "pytorch_lightning" if find_spec("lightning") is None and find_spec("pytorch_lightning") is not None else "lightning"
need_version(_PACKAGE, "2.5", "nw.integrations.lightning")
_pytorch: Any = import_module("lightning.pytorch" if _PACKAGE == "lightning" else _PACKAGE)


class NormwiseCallback(_pytorch.Callback):    # type: ignore[misc]
    """Makes rules hold in every optimizer step of ``trainer.fit()``, under automatic and manual optimization.

    The rules are attached when the strategy has set up module and optimizers, and before their states are loaded: a run that goes on from a
    checkpoint is the uninterrupted one, bit for bit. The checkpoint has the rules' state in its optimizers' states.

    Args:
        rules: what :func:`normwise.attach` takes; or the path of a YAML file; or what such a file holds, as lists and dicts, which is what
            ``LightningCLI`` reads from a configuration. Names of parameters are those of the ``LightningModule``.
        log_every_n_steps: norms go to the Trainer's loggers at every so many steps, as :meth:`normwise.Control.log_to` writes them. None
            (default): as often as the Trainer logs. 0: not at all.
        on_nonfinite: as in :func:`normwise.attach`.

    ``gradient_clip_val`` of the Trainer acts before the rules. A rule that bounds the norm of all gradients takes its place for the fit,
    and a warning says so; under other rules on gradients, and under penalties, both act, and you are told.

    Raises:
        PolicyError: rules that cannot be read; as the fit begins, rules that do not fit the module, a module without optimizers.
    """

    def __init__(self, rules: Any, log_every_n_steps: int | None = None, on_nonfinite: OnNonFinite = "ignore") -> None:
        self.policy, self.log_every_n_steps, self.on_nonfinite = _policy(rules), log_every_n_steps, on_nonfinite
        if log_every_n_steps is not None and (type(log_every_n_steps) is not int or log_every_n_steps < 0):
            raise PolicyError(f"log_every_n_steps is {log_every_n_steps!r}, but it must be a number of steps, 0 or None.")
        self.control: Control | None = None
        """What is at work: the :class:`normwise.Control`; None until a fit begins."""
        self._clipped: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches the rules to the optimizers of this fit."""
        if not any(group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups):
            raise PolicyError(f"rules act in optimizer steps, and {type(pl_module).__name__}.configure_optimizers() returned no optimizer.")
        if self.control is not None:
            self.control.remove()
        self.control = attach(pl_module, trainer.optimizers, self.policy, on_nonfinite=self.on_nonfinite)
        every = trainer.log_every_n_steps if self.log_every_n_steps is None else self.log_every_n_steps
        for logger in trainer.loggers if every else ():
            self.control.log_to(logger, every=every)
        self._clipped, by_norm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm != "value"
        setting = f"gradient_clip_val={self._clipped}"
        if self._clipped and replaced(self.policy, setting, "gradient_clip_val=None", by_norm):
            trainer.gradient_clip_val = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Gives the Trainer its own clipping back; also where the fit raised."""
        if self._clipped is not None:
            trainer.gradient_clip_val, self._clipped = self._clipped, None


def _policy(rules: Any) -> Policy:
    if isinstance(rules, str | os.PathLike):
        return Policy.load(os.fspath(rules))
    if not any(isinstance(one, str | Mapping) for one in (rules if isinstance(rules, list) else [rules])):
        return Policy(rules)
    try:
        text = json.dumps(rules)
    except TypeError as error:
        raise PolicyError(f"rules as data are lists, dicts, texts and numbers ({error}): give all as data, or all as rules.") from error
    return Policy.from_yaml(text, "rules")
