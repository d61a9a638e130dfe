"""Two norms of a convolution that are different numbers: of the operator it applies, and of its flattened filter.

The operator maps whole images to whole images; its norm depends on the padding and slightly on the image's size. The flattened filter
is the matrix (out, in × kernel) whose σ₁ a spectral rule on the weight measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from normwise.errors import NormError
from normwise.norms.decompose import singular_values
from normwise.norms.linalg.checks import peak
from normwise.norms.linalg.spectral_norm import start_vectors
from normwise.norms.reduce import up

ROUNDING = 128    # eps that decompositions and sums may be off by, taken together
_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def convolution_norms(weight: Tensor, size: Sequence[int], groups: int = 1, steps: int = 100) -> dict[str, float]:
    """Every norm of one stride-one convolution side by side, labelled.

    Args:
        weight: (out, in / groups, *kernel).
        size: the image's, one number a kernel axis, at least the kernel's.
        groups: of the convolution.
        steps: power iterations for zero padding.

    Returns:
        ``"operator, circular padding"`` exact; ``"operator, zero padding"`` a lower bound; ``"flattened filter"`` σ₁ of (out, in × kernel),
        the largest over the groups; ``"upper bound from the filter"`` that times √(kernel entries), and a little for the rounding of all
        of these (2e-5 of it in fp32): neither operator norm exceeds it.

    Raises:
        NormError: a weight, a size or a number of groups that no such convolution has.
    """
    flat = float(flattened_filter_norm(weight, groups))
    return {
        "operator, circular padding": float(circular_norm(weight, size, groups)),
        "operator, zero padding": float(zero_padded_norm(weight, size, groups, steps)),
        "flattened filter": flat,
        "upper bound from the filter": flat * math.sqrt(math.prod(weight.shape[2:])) * (1 + ROUNDING * torch.finfo(up(weight).dtype).eps),
    }


def flattened_filter_norm(weight: Tensor, groups: int = 1) -> Tensor:
    """σ₁ of the filters as a matrix (out / groups, in / groups × kernel), the largest over the groups; a 0-d tensor."""
    _check(weight, weight.shape[2:], groups)
    if weight.numel() == 0:
        return up(weight).new_zeros(())
    return singular_values(weight.detach().reshape(groups, weight.shape[0] // groups, -1))[:, 0].max()


def circular_norm(weight: Tensor, size: Sequence[int], groups: int = 1) -> Tensor:
    """The operator norm under circular padding, exactly: the largest σ₁ over the frequencies of the kernel's Fourier transform.

    A 0-d tensor. Sedghi, Gupta, Long 2019, "The Singular Values of Convolutional Layers". Args: as of `convolution_norms`.
    """
    _check(weight, size, groups)
    if weight.numel() == 0:
        return up(weight).new_zeros(())
    axes = tuple(range(2, weight.ndim))
    scale = peak(weight.detach().reshape(1, -1))[0, 0]
    spectrum = torch.fft.rfftn(up(weight.detach()) / scale, s=tuple(size), dim=axes).flatten(2)
    blocks = spectrum.reshape(groups, -1, *spectrum.shape[1:]).permute(0, 3, 1, 2).flatten(0, 1)
    return singular_values(blocks)[..., 0].max() * scale


def zero_padded_norm(weight: Tensor, size: Sequence[int], groups: int = 1, steps: int = 100) -> Tensor:
    """The operator norm under zero padding of half the kernel ("same" for odd kernels), from below, by power iteration.

    A 0-d tensor: ‖conv(v)‖ / ‖v‖ of the last v, which no step makes smaller. A step is one convolution and one transposed one. Args: as of
    `convolution_norms`.
    """
    _check(weight, size, groups)
    if weight.numel() == 0:
        return up(weight).new_zeros(())
    scale = peak(weight.detach().reshape(1, -1))[0, 0]
    kernel, rank = up(weight.detach()) / scale, weight.ndim - 2
    padding = tuple(k // 2 for k in weight.shape[2:])
    flat = start_vectors(kernel.new_empty(1, 1, weight.shape[1] * groups * math.prod(size)), 1)
    v = flat.reshape(1, -1, *size)
    for _ in range(steps):
        v = v / torch.linalg.vector_norm(v).clamp(min=torch.finfo(v.dtype).tiny)
        v = _TRANSPOSED[rank](_CONV[rank](v, kernel, padding=padding, groups=groups), kernel, padding=padding, groups=groups)
    length = torch.linalg.vector_norm(v)
    image = _CONV[rank](v / torch.where(length == 0, 1.0, length), kernel, padding=padding, groups=groups)
    return torch.linalg.vector_norm(image) * scale


def _check(weight: Tensor, size: Sequence[int], groups: int) -> None:
    if weight.ndim not in (3, 4, 5) or not weight.is_floating_point():
        raise NormError(f"a convolution's weight is real, (out, in, *kernel) with 1 to 3 kernel axes; given "
                        f"{tuple(weight.shape)} of {weight.dtype}")
    if len(size) != weight.ndim - 2 or any(s < k for s, k in zip(size, weight.shape[2:], strict=True)):
        raise NormError(f"the image size must have one number, at least the kernel's, for each kernel axis of "
                        f"{tuple(weight.shape)}; given {tuple(size)}")
    if groups < 1 or weight.shape[0] % groups:
        raise NormError(f"groups must divide the {weight.shape[0]} output channels, given {groups}")
