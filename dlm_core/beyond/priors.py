"""What is known of an image before anything is seen: a normal distribution, white or smooth.

An image is grey + L z, with z white and of variance 1, and independent of other images.
"""

from collections.abc import Callable, Sequence

import torch

from dlm_core import check
from dlm_core.coordinates import cosine_basis

STD = 0.25  # of a pixel: 0.256 about grey for the bundled CIFAR-100 images
PRIORS = ("white", "smooth")
# Variance of a frequency f >= 0 in half waves per image: 1/(SOFT + f²). Field (J. Opt. Soc. Am. A
# 1987) found 1/f². Of the bundled CIFAR-100 images f = 0 has three times the variance of f = 1.
SOFT = 0.5
# Of grey and of two opponent colours: the cosines over three channels, measured there too.
COLOURS = (1.0, 0.1, 0.05)

Map = Callable[[torch.Tensor], torch.Tensor]


@check.arguments
def root(name: str, image_shape: Sequence[int]) -> tuple[Map, Map]:
    """(L, Lᵀ), each a map of [..., C, H, W].

    Parameters
    ----------
    name
        "white": pixels are independent. "smooth": independent are the cosine coefficients over
        channel, row and column, with variances as in natural images. The mean variance of a pixel
        is ``STD**2`` for both.
    image_shape
        (C, H, W).

    Raises
    ------
    ValueError
        For an unknown name.
    """
    check.one_of("prior", name, PRIORS)
    if name == "white":
        return (lambda z: STD * z), (lambda x: STD * x)
    amplitude = STD * _amplitude(image_shape)
    channel, row, column = (cosine_basis(n) for n in image_shape)
    planes = "dc,ih,jw,...{}->...{}"

    def to_images(z: torch.Tensor) -> torch.Tensor:
        scaled = amplitude.to(z) * z
        along = (channel.to(z), row.to(z), column.to(z))
        return torch.einsum(planes.format("dij", "chw"), *along, scaled)

    def to_coefficients(x: torch.Tensor) -> torch.Tensor:
        along = (channel.to(x), row.to(x), column.to(x))
        return amplitude.to(x) * torch.einsum(planes.format("chw", "dij"), *along, x)

    return to_images, to_coefficients


@check.arguments
def variance(name: str, image_shape: Sequence[int]) -> torch.Tensor:
    """[C, H, W] of each pixel before anything is seen, in float64.

    Parameters
    ----------
    name, image_shape
        Of ``root``.
    """
    check.one_of("prior", name, PRIORS)
    if name == "white":
        return torch.full(tuple(image_shape), STD**2, dtype=torch.float64)
    bases = [cosine_basis(n).double().square() for n in image_shape]
    coefficients = STD**2 * _amplitude(image_shape).square()
    return torch.einsum("dc,ih,jw,dij->chw", *bases, coefficients)


def _amplitude(image_shape: Sequence[int]) -> torch.Tensor:
    """[C, H, W] standard deviations of the coefficients, of mean square 1."""
    channels, height, width = image_shape
    rows, columns = torch.arange(height).double(), torch.arange(width).double()
    variance = 1 / (SOFT + rows.square()[:, None] + columns.square())
    colours = torch.tensor(COLOURS if channels == 3 else (1.0,) * channels).double()
    variance = colours[:, None, None] * variance
    return (variance / variance.mean()).sqrt()
