"""Hugging Face's Trainer: rules that it trains under, and presets as its optimizer.

>>> rules = nw.integrations.transformers.attach(trainer, [nw.max_norm(3.0)])
>>> trainer.train()
>>> print(rules.control.verify())
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from normwise import optim
from normwise.control import Control
from normwise.control import attach as attach_to_optimizer
from normwise.engine.nonfinite import OnNonFinite
from normwise.engine.program import optimizers_of
from normwise.errors import PolicyError, a_kind_of, nearest, need_version
from normwise.integrations.own_clipping import replaced
from normwise.logs import Logger
from normwise.policy import Policy

need_version("transformers", "5.2", "nw.integrations.transformers")
_library: Any = import_module("transformers")


def attach(trainer: Any, rules: Any, *, log: bool = True, on_nonfinite: OnNonFinite = "ignore") -> Rules:
    """Makes ``rules`` hold in every step of ``trainer.train()``.

    The rules are attached when the Trainer has made and wrapped model and optimizer, and before it loads their states: a run that resumes
    from a checkpoint is the uninterrupted one, bit for bit. Accumulation, bf16, ``torch_compile``, DDP and FSDP2 need nothing else. A
    second ``train()`` goes on under the same rules; one that makes a new model (``model_init``) attaches them anew.

    Args:
        trainer: a ``transformers.Trainer``, or a subclass of your own.
        rules: what :func:`normwise.attach` takes.
        log: add the norms of the step, and how many blocks each rule changed, to what the Trainer logs of its training, under the names of
            :meth:`normwise.Control.log_to`: in ``trainer.state.log_history`` and in all of its loggers, not on the terminal. Other steps
            cost nothing; with ``logging_strategy="epoch"`` norms are recorded at every step, since nobody knows which is the last.
        on_nonfinite: as in :func:`normwise.attach`.

    The Trainer clips gradients itself, to ``max_grad_norm=1.0`` if you say nothing. A rule that bounds the norm of all gradients takes the
    place of that, and a warning says so. Under other rules on gradients and under penalties both act, the Trainer's first, and you are
    told; without such rules nothing changes.

    Returns:
        The rules of this Trainer: ``.control`` is the :class:`normwise.Control` once training has begun; ``.remove()`` takes them off.

    Raises:
        PolicyError: what is no Trainer, one that has rules already, one that trains by DeepSpeed; rules that do not fit its model.
    """
    if not isinstance(trainer, _library.Trainer):
        raise PolicyError(f"attach takes a transformers.Trainer, given {a_kind_of(trainer)}. For an optimizer there is nw.attach.")
    if not hasattr(trainer, "_load_optimizer_and_scheduler"):
        raise PolicyError(
            f"rules attach before the Trainer loads states, in a method that transformers {_library.__version__} does not have; 5.24 does."
        )
    if any(isinstance(one, Rules) for one in trainer.callback_handler.callbacks):
        raise PolicyError("this Trainer has rules already: put all of them into one attach, or take the others off by their remove().")
    if trainer.is_deepspeed_enabled:
        raise PolicyError("DeepSpeed steps copies of the weights that rules cannot reach: train by DDP or FSDP2, or without rules.")
    policy = Policy(rules)
    if trainer.model is not None:
        policy.explain(trainer.model)    # what does not fit is told now, not when training begins
    clipping = trainer.args.max_grad_norm
    takes_its_place = clipping and clipping > 0 and replaced(policy, f"max_grad_norm={clipping}", "max_grad_norm=0.0")
    rules = Rules(trainer, policy, log, on_nonfinite)
    if takes_its_place:
        rules.clipped, trainer.args.max_grad_norm = clipping, 0.0
    return rules


class Rules(_library.TrainerCallback):    # type: ignore[misc]
    """The rules of a Trainer; made by :func:`attach`."""

    def __init__(self, trainer: Any, policy: Policy, log: bool, on_nonfinite: OnNonFinite) -> None:
        self.trainer, self.policy, self.on_nonfinite = trainer, policy, on_nonfinite
        self.control: Control | None = None
        """What is at work; None until training begins."""
        self.clipped: float | None = None
        """The Trainer's own ``max_grad_norm``, where a rule has taken its place."""
        self._log, self._numbers = log, dict[str, float]()
        self._load: Callable[..., Any] = trainer._load_optimizer_and_scheduler
        trainer._load_optimizer_and_scheduler = self._before_loading
        callbacks = trainer.callback_handler.callbacks
        prints = [one for one in callbacks if isinstance(one, _library.PrinterCallback | _library.ProgressCallback)]
        # Loggers get what this adds to the logs; a line on the terminal stays what it was.
        callbacks[:] = [*prints, self, *(one for one in callbacks if one not in prints)]

    def remove(self) -> None:
        """Takes the rules off the Trainer, which clips gradients itself again if it did; the weights stay as they are."""
        if self.clipped is not None:
            self.trainer.args.max_grad_norm, self.clipped = self.clipped, None
        self.trainer.callback_handler.remove_callback(self)
        self.trainer._load_optimizer_and_scheduler = self._load
        if self.control is not None:
            self.control.remove()

    def _before_loading(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        return self._load(*args, **kwargs)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Where no checkpoint was loaded, this is the first that is heard of a training."""
        self._begin()

    def _begin(self) -> None:
        model, optimizers = self.trainer.model, optimizers_of(self.trainer.optimizer)
        if self.control is not None:
            if self.control.optimizers == optimizers and self.control._model is model:
                return
            self.control.remove()
        always = self._log and self.trainer.args.logging_strategy == "epoch"
        self.control = attach_to_optimizer(model, optimizers, self.policy, log=always, on_nonfinite=self.on_nonfinite)
        if self._log and not always:
            self.control.log_to(_WhenTrainerLogs(self.trainer, self._take))

    def _take(self, step: int, numbers: Any, units: Any) -> None:
        self._numbers = dict(numbers)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Adds the norms to what the Trainer logs of its steps, not to what it logs of an evaluation."""
        if self._log and self.control is not None and logs is not None and "loss" in logs:
            numbers = self.control.norms().flat() if args.logging_strategy == "epoch" else self._numbers
            logs.update(numbers)
            state.log_history[-1].update(numbers)
            self._numbers = {}


class _WhenTrainerLogs(Logger):
    """Takes the norms of the steps that the Trainer is going to log."""

    def __init__(self, trainer: Any, take: Callable[..., None]) -> None:
        super().__init__("the Trainer's log", take, 1, False)
        self.trainer = trainer

    def due(self, step: int) -> bool:
        args, state = self.trainer.args, self.trainer.state
        following = state.global_step + 1    # the Trainer counts a step after its optimizer
        first = following == 1 and args.logging_first_step
        return bool(args.logging_strategy == "steps" and (first or following % state.logging_steps == 0))


def optimizer(preset: str = "auto", **options: Any) -> tuple[Any, dict[str, Any]]:
    """A preset of :mod:`normwise.optim` as the Trainer's optimizer, with the roles of the model that is trained.

    Args:
        preset: ``"auto"``, or the name of another: ``"Muon"``, ``"AdamH"``, ...
        options: of the preset, its ``lr`` among them: the Trainer's ``learning_rate``, ``weight_decay`` and ``optim`` say nothing here, as
            for every ``optimizer_cls_and_kwargs``. Its learning-rate scheduler multiplies the preset's rates.

    Returns:
        What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

    Raises:
        PolicyError: an unknown preset, or an option that it does not have.

    >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=nw.integrations.transformers.optimizer("auto"))
    """
    made = preset_named(preset)
    made.__new__(made, **options)    # tells of options that it does not have, before the model is there
    return partial(preset_named, preset), options


def preset_named(name: str) -> Any:
    """The class or function of a preset."""
    known = {**optim.PRESETS, "auto": optim.auto}
    if name not in known:
        raise PolicyError(f"{name!r} is no preset.{nearest(str(name), known)}")
    return known[name]
