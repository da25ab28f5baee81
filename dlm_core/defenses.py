"""Defences: the two released ones, of a snapshot; common ones, of the update Δ; who sees their result; and their ε.

Nothing is changed in place. Of a snapshot (a state dict) only the tensors named in ``parameters`` are defended; buffers pass
through. An update is a list of float64 tensors, as ``federated.weight_delta`` gives it.
"""

import copy
import math
import warnings

import torch

from dlm_core import check, federated
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
        factor = undone_clip(tensor, clip)
        draw = _draw(distribution, tensor.shape, generator).to(tensor)
        defended[name] = (tensor / factor + scale * draw) * factor
    return defended


def undone_clip(tensor, clip):
    """c = max(1, largest row norm / clip), by which ``noise`` divides a tensor and multiplies it again."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[None]
    return (rows.norm(dim=1).max() / clip).clamp(min=1)


def sparsify(weights, *, percent, parameters=None):
    """Zero the ``percent`` % of each tensor's entries that are smallest in magnitude; 0 changes nothing.

    percent  in [0, 100].
    """
    check.in_range("percent", percent, 0, 100)
    defended = dict(weights)
    for name in weights if parameters is None else parameters:
        tensor = weights[name]
        dropped = tensor.abs().flatten().argsort(stable=True)[: int(tensor.numel() * percent / 100)]
        defended[name] = tensor.clone()
        defended[name].view(-1)[dropped] = 0
    return defended


def clip_and_noise(update, *, clip, noise_multiplier=0.0, seed=0):
    """The Gaussian mechanism: scale the update down to norm ``clip`` where it is longer, add N(0, (noise_multiplier·clip)²).

    Done by each client it is local differential privacy. Central privacy (McMahan et al. 2018) adds the same noise once, to
    the sum of the clients' clipped updates: the server then sees each of them with ``noise_multiplier`` 0. See ``epsilon``.
    """
    check.in_range("clip", clip, 0, math.inf, open_low=True)
    check.in_range("noise_multiplier", noise_multiplier, 0, math.inf)
    generator = torch.Generator().manual_seed(seed)
    length = torch.stack([layer.norm() for layer in update]).norm()
    factor = (clip / length).clamp(max=1)
    scale = noise_multiplier * clip
    return [factor * layer + scale * _draw("gaussian", layer.shape, generator).to(layer) for layer in update]


def top_k(update, *, percent):
    """Zero the ``percent`` % of the whole update's entries that are smallest in magnitude; the others stay as they are."""
    check.in_range("percent", percent, 0, 100)
    sizes = [layer.numel() for layer in update]
    every = torch.cat([layer.flatten() for layer in update])
    every[every.abs().argsort(stable=True)[: int(len(every) * percent / 100)]] = 0
    return [part.reshape(layer.shape) for part, layer in zip(every.split(sizes), update)]


def quantise(update, *, bits=8, seed=0):
    """Round each entry at random to one of its two neighbours on a grid, unbiased (QSGD: Alistarh et al. 2017).

    The grid of a tensor has 2^bits - 1 points and ends at its largest magnitude; ``bits`` at least 2.
    """
    check.at_least("bits", bits, 2)
    generator = torch.Generator().manual_seed(seed)
    rounded = []
    for layer in update:
        step = grid_step(layer, bits)
        draw = torch.rand(layer.shape, generator=generator, dtype=torch.float64).to(layer)
        rounded.append((layer / step + draw).floor() * step)
    return rounded


def grid_step(tensor, bits):
    """Distance of two points of the grid on which ``quantise`` puts a tensor."""
    return tensor.abs().max().clamp(min=1e-300) / (2 ** (bits - 1) - 1)


OF_UPDATES = (clip_and_noise, top_k, quantise)
WITHOUT_CHANCE = (sparsify, top_k)


def defend(seen, defence, *, observer="channel", repeats=1, seed=0, **options):
    """Return what remains visible when the client defends itself with ``defence``, one of this module, or a function of your
    own (state dict, *, parameters, seed, and your ``options``) -> state dict, as ``noise`` is.

    observer  "channel" sees both snapshots defended, each with its own noise (the released experiment; the client trains
              on its raw weights); "server" sent W_t itself and knows it exactly. Defences of Δ leave W_t public: no difference.
    repeats   the observer averages so many answers of the client to the same W_t, each with noise of its own.

    Raises ValueError for arguments out of range, and where the defended snapshots no longer differ.
    """
    check.one_of("observer", observer, OBSERVERS)
    check.at_least("repeats", repeats, 1)
    before, names = seen.model.state_dict(), [name for name, _ in seen.model.named_parameters()]
    afters, befores = [], []
    for answer in range(repeats):
        draw = 2 * (seed + 10_007 * answer)
        seeds = ({}, {}) if defence in WITHOUT_CHANCE else ({"seed": draw}, {"seed": draw + 1})
        if defence in OF_UPDATES:
            update = defence(federated.weight_delta(seen), **seeds[1], **options)
            moved = {name: (before[name].double() - u).to(before[name].dtype) for name, u in zip(names, update)}
            afters.append({**seen.weights_after, **moved})
        else:
            afters.append(defence(copy.deepcopy(seen.weights_after), parameters=names, **seeds[1], **options))
            befores.append(defence(copy.deepcopy(before), parameters=names, **seeds[0], **options))
    if not all(isinstance(weights, dict) for weights in afters + befores):
        raise ValueError(f"defence {defence!r} returned no dict; it takes a state dict and returns one")
    model, equal = copy.deepcopy(seen.model), [1] * repeats
    if observer == "channel" and befores:
        model.load_state_dict(befores[0] if repeats == 1 else federated.average(befores, equal))
    after = afters[0] if repeats == 1 else federated.average(afters, equal)
    return Observation(model, after, seen.image_shape, seen.num_classes)


def epsilon(*, noise_multiplier, rounds, sample_rate=1.0, delta=1e-5):
    """ε of ``rounds`` Gaussian mechanisms at ``delta``, by Opacus' Rényi accountant; what is hidden is one clipped update.

    noise_multiplier  noise std over clip, of ``clip_and_noise`` or of DP-SGD.
    sample_rate       chance of each client (DP-SGD: example) to take part in a round, drawn independently.

    Raises ValueError for arguments out of range. Infinite where ``noise_multiplier`` is 0.
    """
    check.in_range("noise_multiplier", noise_multiplier, 0, math.inf)
    check.at_least("rounds", rounds, 1)
    check.in_range("sample_rate", sample_rate, 0, 1, open_low=True)
    check.in_range("delta", delta, 0, 1, open_low=True)
    if noise_multiplier == 0:
        return math.inf
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, rounds)]
    orders = [1.01, 1.02, 1.05, *RDPAccountant.DEFAULT_ALPHAS, *range(64, 2048, 16)]  # also for very small and large noise
    with warnings.catch_warnings():  # that a wider range of orders could give a smaller ε: it stays an upper bound
        warnings.filterwarnings("ignore", "Optimal order")
        return float(accountant.get_epsilon(delta, alphas=orders))


def train_privately(model, images, labels, *, lr, clip, noise_multiplier, steps=1, seed=0):
    """Train as ``federated.train_locally`` does, by Opacus' DP-SGD (Abadi et al. 2016), all images in each step.

    Each image's gradient is scaled down to norm ``clip`` where it is longer; their sum gets N(0, (noise_multiplier·clip)²).
    """
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    check.in_range("lr", lr, 0, math.inf, open_low=True)
    check.in_range("clip", clip, 0, math.inf, open_low=True)
    check.in_range("noise_multiplier", noise_multiplier, 0, math.inf)
    client = copy.deepcopy(model)
    hooked = GradSampleModule(client)  # its hooks in the layers keep each image's own gradient
    settings = {"max_grad_norm": clip, "expected_batch_size": len(images), "noise_multiplier": noise_multiplier}
    generator = torch.Generator(device=images.device).manual_seed(seed)
    stepper = DPOptimizer(torch.optim.SGD(hooked.parameters(), lr=lr), generator=generator, **settings)
    images = images.clone().requires_grad_()  # without, the hooks of the first layer warn
    return federated.descend(copy.deepcopy(model), client, stepper, images, labels, steps)


def _draw(distribution, shape, generator):
    """Unit-scale noise in float64, drawn on the CPU so that a seed means the same everywhere."""
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    first, second = (torch.empty(shape, dtype=torch.float64).exponential_(generator=generator) for _ in range(2))
    return first - second
