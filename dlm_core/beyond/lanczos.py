"""The spectrum of a symmetric matrix that can only be multiplied by: Lanczos from random vectors.

Functions of the matrix follow from a few dozen products. Sums over all its eigenvalues come out to
about 1/√(n · number of vectors), relative (Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 2017).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

NONE_LEFT = 1e-10  # length, relative to the matrix, of a new direction that is none


@dataclass(frozen=True)
class Krylov:
    """What Lanczos finds of a positive semi-definite matrix B [n, n].

    Attributes
    ----------
    starts
        [p, n] the random vectors, of entries ±1.
    basis
        [p, k, n] an orthonormal basis for each.
    values
        [p, k] eigenvalues of B within it.
    vectors
        [p, k, k] their coordinates, column by column.
    """

    starts: torch.Tensor
    basis: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """[p, k] for how many of B's eigenvalues each of ``values`` stands; their sum is n."""
        return self.starts.shape[1] * self.vectors[:, 0].square() / len(self.starts)

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """[p, n], ``function`` of B times each start."""
        length = self.starts.norm(dim=1)[:, None]
        coordinates = self.vectors @ (function(self.values) * self.vectors[:, 0])[..., None]
        return length * (self.basis.transpose(1, 2) @ coordinates)[..., 0]


def lanczos(
    times: Callable[[torch.Tensor], torch.Tensor],
    n: int,
    *,
    starts: int,
    steps: int,
    seed: int,
    like: torch.Tensor,
) -> Krylov:
    """Run ``steps`` steps of it, with full reorthogonalisation.

    Parameters
    ----------
    times
        [p, n] -> [p, n], B times each.
    n
        Size of B.
    starts
        p, the number of random vectors.
    steps
        k, at most n: products with B.
    seed
        Of the vectors.
    like
        A tensor of the dtype and on the device wanted.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, (starts, n), generator=generator) - 1
    z = signs.to(like)
    basis = z.new_zeros(starts, steps, n)
    projected = z.new_zeros(starts, steps, steps)
    q = z / z.norm(dim=1, keepdim=True)
    for k in range(steps):
        basis[:, k] = q
        new = times(q)
        along = torch.einsum("pkn,pn->pk", basis[:, : k + 1], new)
        projected[:, k, : k + 1] = projected[:, : k + 1, k] = along
        size = new.norm(dim=1, keepdim=True)
        for _ in range(2):  # once leaves what rounding made of it
            along = torch.einsum("pkn,pn->pk", basis[:, : k + 1], new)
            new = new - torch.einsum("pkn,pk->pn", basis[:, : k + 1], along)
        length = new.norm(dim=1, keepdim=True)
        # where all is found, nothing is left: the rest of the basis is 0, and stands for nothing
        q = torch.where(length > NONE_LEFT * size, new / length, 0.0)
    values, vectors = torch.linalg.eigh(projected)
    return Krylov(z, basis, values.clamp(min=0), vectors)
