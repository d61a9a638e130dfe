"""What a copied or unpickled control is: it holds nothing, and says so."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

from torch import Tensor, nn

from normwise.errors import NormwiseError, PolicyError
from normwise.policy import Policy


class Detached:
    """The place of a control in a copy of what held it, as in ``copy.deepcopy(module)`` or after ``torch.save(module)``.

    torch copies optimizers without their hooks, so no rule acts there. It is false, ``verify()`` refuses, and everything else that a
    control has is an error that says how to attach again. ``policy`` is the control's, None where an unpickled one held functions.
    """

    def __init__(self, text: str, policy: Policy | None) -> None:
        self.text, self.policy = text, policy

    @classmethod
    def of(cls, text: str, policy: Policy | str | None) -> Detached:
        """A copy of the control that ``text`` describes; ``policy`` may be its YAML. Warns."""
        made = cls(text, Policy.from_yaml(policy) if isinstance(policy, str) else policy)
        warnings.warn(made._why(), stacklevel=4)
        return made

    def report_max_logits(self, attention: str | nn.Module, maxima: Tensor) -> None:
        """Nothing: an attention that reports its logits may run in a copy too, as in one that averages weights."""

    def remove(self) -> None:
        """Nothing: no hooks are there."""

    def verify(self) -> NoReturn:
        """PolicyError: nothing is enforced here, so there is nothing to verify."""
        raise PolicyError(self._why())

    def state_dict(self) -> NoReturn:
        """PolicyError: the state is the control's that was copied."""
        raise PolicyError(self._why())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("text", "policy"):    # protocols ask for what may not be there
            raise AttributeError(name)
        raise AttributeError(f"{self._why()} It has no {name}.")

    def __bool__(self) -> bool:
        return False

    def __deepcopy__(self, memo: object) -> Detached:
        return self

    def __reduce__(self) -> Any:
        return Detached, (self.text, None)

    def __repr__(self) -> str:
        return f"Detached(copy of {self.text}; no rule acts)"

    def _why(self) -> str:
        return (
            f"this is a detached copy of {self.text}: no rule acts, since torch copies optimizers without their hooks. Attach the policy "
            "to the copies: twin = nw.attach(model_copy, optimizer_copy, control.policy); twin.load_state_dict(control.state_dict())."
        )


def yaml_of(policy: Policy) -> str | None:
    """The policy as YAML; None where a function in it, or a missing PyYAML, leaves it without."""
    try:
        return policy.to_yaml()
    except NormwiseError:
        return None
