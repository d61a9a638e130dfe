"""A small DCGAN: a generator with BatchNorm, a discriminator without it, their losses and gradient penalties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.experiments.tasks.data.splits import ImageData

# Length of the generator's input.
NOISE = 64
SLOPE = 0.2
_LEAST, _MOST = 8, 32
_GENERATOR_STD = 0.02

Score = Callable[[Tensor], Tensor]


class Generator(nn.Module):
    """Noise ``(n, 64)`` to images ``(n, channels, height, width)`` in (-1, 1).

    shape: (channels, height, width) of an image, 8×8 to 32×32. width: channels of the last hidden layer, twice as many in the
    first (default 32: 50 thousand parameters on 8×8, 234 thousand on 28×28). Three transposed convolutions, BatchNorm and ReLU
    between them, tanh at the end, weights from a normal of 0.02 (Radford, Metz and Chintala, DCGAN, 2016). A size that four does not
    divide is cut from the next larger one that it does.
    Raises StudyError for an image that is too small or too large.
    """

    def __init__(self, shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        _check(shape)
        channels, height, wide = shape
        self.size = (height, wide)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(NOISE, 2 * width, (-(-height // 4), -(-wide // 4)), bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.apply(_start)

    def forward(self, noise: Tensor) -> Tensor:
        # A tenth less time on the CPU; the weights keep their plain layout, so that rules see one view of them, not a copy.
        spots = noise[:, :, None, None].contiguous(memory_format=torch.channels_last)
        images: Tensor = self.layers(spots)
        return images[:, :, : self.size[0], : self.size[1]]


class Discriminator(nn.Module):
    """Images ``(n, channels, height, width)`` to logits ``(n,)``, higher for images that look real.

    shape, width: as for the generator (36 thousand parameters on 28×28). Two convolutions of stride 2, LeakyReLU of slope 0.2, a
    linear head. No BatchNorm: it would make an image's logit depend on the other images, so that neither a gradient penalty nor a
    bound on the layers' norms would bound the network's slope (Gulrajani et al., 2017). Without it a normal of 0.02 would fade
    through the layers, so the weights start as He et al. (2015) have it.
    Raises StudyError for an image that is too small or too large.
    """

    def __init__(self, shape: tuple[int, int, int], width: int = 32) -> None:
        super().__init__()
        _check(shape)
        channels, height, wide = shape
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(SLOPE),
            nn.Flatten(), nn.Linear(2 * width * (height // 4) * (wide // 4), 1),
        )  # fmt: skip
        self.apply(_start)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images.contiguous(memory_format=torch.channels_last))
        return logits.squeeze(1)


def _check(shape: tuple[int, int, int]) -> None:
    if not all(_LEAST <= size <= _MOST for size in shape[1:]):
        raise StudyError(f"Images are {shape[1]}×{shape[2]}, but the GAN draws {_LEAST}×{_LEAST} to {_MOST}×{_MOST}; resize them.")


def _start(module: nn.Module) -> None:
    """The initial weights of a layer of either network."""
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=_GENERATOR_STD)
    elif isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, SLOPE)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def scaled(images: NDArray[np.uint8], top: int) -> Tensor:
    """Bytes in [-1, 1] as fp32, the range of tanh: 0 becomes -1, ``top`` becomes 1 and larger ones too."""
    return torch.from_numpy(np.ascontiguousarray(images)).float().mul_(2.0 / top).sub_(1.0).clamp_(max=1.0)


def brightest(data: ImageData) -> int:
    """The largest value of the training part: 255 as a rule, 16 in scikit-learn's digits."""
    return max(int(data.train.images.max()), 1)


# -------------------------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Loss:
    """What both sides minimise. D(x) are logits.

    discriminator: (D(real), D(fake)) to a scalar. generator: D(fake) to a scalar. betas: of Adam, as in the source that made the
    loss work with it.
    """

    label: str
    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Score
    betas: tuple[float, float]


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-E log σ(D(x)) - E log(1 - σ(D(G(z)))) (Goodfellow et al., 2014, equation 1), through softplus, which does not overflow."""
    return nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """-E log σ(D(G(z))): the non-saturating form (Goodfellow et al., 2014, section 3)."""
    return nn.functional.softplus(-fake).mean()


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E D(G(z)) - E D(x) (Arjovsky, Chintala and Bottou, 2017): minus the Wasserstein distance where D has slope at most 1."""
    return fake.mean() - real.mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))) (Lim and Ye, 2017; Miyato et al., 2018)."""
    return nn.functional.relu(1 - real).mean() + nn.functional.relu(1 + fake).mean()


def raised_generator(fake: Tensor) -> Tensor:
    """-E D(G(z)): of the Wasserstein and the hinge loss."""
    return -fake.mean()


LOSSES: dict[str, Loss] = {
    "non_saturating": Loss("non-saturating", non_saturating_discriminator, non_saturating_generator, (0.5, 0.999)),
    "wasserstein": Loss("Wasserstein", wasserstein_discriminator, raised_generator, (0.0, 0.9)),
    "hinge": Loss("hinge", hinge_discriminator, raised_generator, (0.0, 0.9)),
}
"""Formulas and sources stand at the functions; the betas are Radford et al.'s (2016) and Gulrajani et al.'s (2017)."""


# ----------------------------------------------------------------------------------------------------------- penalties


def gradient_penalty(score: Score, real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """E (‖∇D(x̂)‖₂ - 1)² at x̂ = u x + (1 - u) G(z), one u from U(0, 1) for each pair (Gulrajani et al., 2017, equation 3).

    score: images to logits ``(n,)``. real, fake: ``(n, channels, height, width)``; no gradient flows into either. generator: of u.
    A scalar with a graph to the parameters of ``score``.
    """
    shares = torch.rand(len(real), 1, 1, 1, generator=generator).to(real)
    between = torch.lerp(fake.detach(), real.detach(), shares)
    # The root of a square of exactly 0 has no finite slope; a critic that is flat somewhere must not spoil the step.
    norms = (_slopes(score, between).square().sum(1) + 1e-12).sqrt()
    return (norms - 1).square().mean()


def r1_penalty(score: Score, real: Tensor, fake: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """½ E ‖∇D(x)‖₂² at real images (Mescheder, Geiger and Nowozin, 2018, equation 9 without its γ).

    Takes what :func:`gradient_penalty` takes, and leaves ``fake`` and ``generator`` unused.
    """
    return _slopes(score, real.detach()).square().sum(1).mean() / 2


def _slopes(score: Score, images: Tensor) -> Tensor:
    """∇D at each image, flattened: ``(n, entries)``. The sum's gradient is each image's own, as no logit depends on another image."""
    inputs: Any = images.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(score(inputs).sum(), inputs, create_graph=True)
    return slopes.flatten(1)
