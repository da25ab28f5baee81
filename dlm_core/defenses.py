"""The two released defences, as functions of a snapshot (a state dict), and who sees their result.

Nothing is changed in place. Only the tensors named in ``parameters`` are defended; buffers pass through.
"""

import copy
import math

import torch

from dlm_core import check
from dlm_core.federated import Observation

DISTRIBUTIONS = ("laplace", "gaussian")
OBSERVERS = ("channel", "server")


def noise(weights, *, scale, distribution="laplace", seed=0, clip=0.2, parameters=None):
    """Add noise as the released code does: clip each tensor, add noise of ``scale``, and undo the clip.

    Each tensor is divided by c = max(1, largest row norm / clip), noised, and multiplied by c again, so that the noise
    on the weights is c times its nominal scale, and the clip bounds nothing: there is no ε.

    weights       state dict.         scale  of Laplace(0, scale) or N(0, scale²), at least 0; 0 changes nothing.
    distribution  "laplace" or "gaussian".
    """
    check.in_range("scale", scale, 0, math.inf)
    check.in_range("clip", clip, 0, math.inf, open_low=True)
    check.one_of("distribution", distribution, DISTRIBUTIONS)
    generator = torch.Generator().manual_seed(seed)
    defended = dict(weights)
    for name in weights if parameters is None else parameters:
        tensor = weights[name]
        if scale == 0:
            continue
        rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[None]
        factor = (rows.norm(dim=1).max() / clip).clamp(min=1)
        draw = _draw(distribution, tensor.shape, generator).to(tensor)
        defended[name] = (tensor / factor + scale * draw) * factor
    return defended


def sparsify(weights, *, percent, parameters=None):
    """Zero the ``percent`` % of each tensor's entries that are smallest in magnitude; 0 changes nothing.

    percent  in [0, 100].
    """
    check.in_range("percent", percent, 0, 100)
    defended = dict(weights)
    for name in weights if parameters is None else parameters:
        tensor = weights[name]
        dropped = tensor.abs().flatten().argsort(stable=True)[: int(tensor.numel() * percent / 100)]
        kept = tensor.clone()
        kept.view(-1)[dropped] = 0
        defended[name] = kept
    return defended


def defend(seen, defence, *, observer="channel", seed=0, **options):
    """Return what remains visible when the client defends its snapshots with ``noise`` or ``sparsify``.

    observer  "channel" sees both snapshots defended, each with its own noise (the released experiment; the client trains
              on its raw weights); "server" sent W_t itself and knows it exactly.

    Raises ValueError for arguments out of range, and where the defended snapshots no longer differ.
    """
    check.one_of("observer", observer, OBSERVERS)
    names = [name for name, _ in seen.model.named_parameters()]
    seeds = ({}, {}) if defence is sparsify else ({"seed": 2 * seed}, {"seed": 2 * seed + 1})
    after = defence(seen.weights_after, parameters=names, **seeds[1], **options)
    model = copy.deepcopy(seen.model)
    if observer == "channel":
        model.load_state_dict(defence(seen.model.state_dict(), parameters=names, **seeds[0], **options))
    return Observation(model, after, seen.image_shape, seen.num_classes)


def _draw(distribution, shape, generator):
    """Unit-scale noise in float64, drawn on the CPU so that a seed means the same everywhere."""
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    first, second = (torch.empty(shape, dtype=torch.float64).exponential_(generator=generator) for _ in range(2))
    return first - second
