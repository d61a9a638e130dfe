"""Rules on DTensors: each rank works on its own part of every parameter, and little is sent.

``placement`` tells which part of a parameter lies here, ``collectives`` sends and counts, ``norms`` measures many norms in one collective,
``block_exchange`` brings whole matrices to one rank each, ``pack`` is what the rules work on, ``grouping`` makes packs of either kind.
"""

from torch import nn


def reshard(model: nn.Module) -> None:
    """Puts the parts back in their places where FSDP2 has left parameters whole, as after a forward pass without a backward: the optimizer
    holds the parts. Nothing is sent."""
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()    # type: ignore[operator]
