"""Random numbers that are drawn on the side: what is drawn after them is what it would have been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch


@contextmanager
def same_draws(seed: int | None = None) -> Iterator[None]:
    """Afterwards the generators of Python, NumPy and torch are as they were: what draws from them next draws the same.

    Args:
        seed: of all of them within; None leaves them as they are.
    """
    devices = torch.cuda.is_initialized()    # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        if devices:
            stack.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)    # torch.manual_seed would seed devices, too, that are not put back
            if devices:
                torch.cuda.manual_seed_all(seed)
        yield
