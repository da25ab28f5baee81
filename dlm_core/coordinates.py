"""The dummy images as an optimizer sees them: a start, and a map from coordinates to pixels.

The choice changes no objective, only how fast an optimizer gets down it. In pixels, L-BFGS
needs thousands of evaluations on LeNet; in scaled cosine coordinates, where natural images are
roughly white, about two hundred.
"""

import math
from collections.abc import Callable, Sequence

import torch

Start = tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]


def pixels(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> Start:
    """The released choice: pixel by pixel, unbounded, from N(0, 1).

    Parameters
    ----------
    shape
        (B, C, H, W).
    like
        A tensor of the dtype and on the device wanted.
    generator
        Of the start, on the CPU.

    Returns
    -------
    tuple
        The start [B, C, H, W], and the map from such coordinates to images [B, C, H, W].
    """
    return _noise(shape, like, generator), lambda z: z


def cosines(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> Start:
    """Images as sigmoid(Cᵀ(a·z)): z are cosine coefficients, a falls off as 1/frequency.

    Parameters
    ----------
    shape, like, generator
        As in ``pixels``.

    Returns
    -------
    tuple
        The start [B, C, H, W], mid-grey with faint noise, and the map from such coefficients, over
        channel, row and column, to images [B, C, H, W] in (0, 1).
    """
    planes = smooth_planes(shape, like)
    return 0.1 * _noise(shape, like, generator), lambda z: torch.sigmoid(planes(z))


def smooth_planes(
    shape: Sequence[int], like: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The map of ``cosines`` before its sigmoid: Cᵀ(a·z).

    Parameters
    ----------
    shape, like
        As in ``pixels``.
    """
    _, channels, height, width = shape
    c, y, x = (cosine_basis(n).to(like) for n in (channels, height, width))
    rows, columns = torch.arange(height) * 1.0, torch.arange(width) * 1.0
    frequency = torch.hypot(*torch.meshgrid(rows, columns, indexing="ij"))
    amplitude = 1 / ((1 + frequency / 2) * (1 + torch.arange(channels))[:, None, None])
    amplitude = (amplitude / amplitude.square().mean().sqrt()).to(like)
    return lambda z: torch.einsum("dc,bdhw->bchw", c, y.T @ (amplitude * z) @ x)


def _noise(shape: Sequence[int], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """N(0, 1) drawn on the CPU, so that a seed means the same start on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def cosine_basis(n: int) -> torch.Tensor:
    """Orthonormal DCT-II matrix [n frequencies, n samples], float64."""
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi / n * (k + 0.5) * k[:, None]) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis
