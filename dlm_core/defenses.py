"""Defences: the two released ones, of a snapshot; common ones, of the update Δ; who sees their result; and their ε.

Nothing is changed in place. Of a snapshot (a state dict) only the tensors named in ``parameters`` are defended; buffers pass
through. An update is a sequence of float64 tensors, as ``Observation.delta``.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dlm_core import check, federated, records
from dlm_core.observation import Observation
from dlm_core.records import DEFENCES, Defence, Options
from dlm_core.weights import StateDict

DISTRIBUTIONS = ("laplace", "gaussian")
OBSERVERS = ("channel", "server")
Update = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """A registered defence with its strength, as a value: what a client does, and what an attacker may be told.

    Attributes
    ----------
    name
        Key of ``records.DEFENCES``.
    options
        Keyword arguments of that function, ``seed`` and ``parameters`` aside.
    observer
        "channel" sees both snapshots defended, each with its own noise; "server" sent W_t itself and knows it exactly.
    repeats
        The observer averages so many answers of the client to the same W_t.

    Raises
    ------
    ValueError
        For an unknown defence, observer or option, naming the near ones.
    """

    name: str
    options: Options = Options()
    observer: str = "channel"
    repeats: int = 1

    def __post_init__(self) -> None:
        check.one_of("defence", self.name, DEFENCES)
        check.one_of("observer", self.observer, OBSERVERS)
        check.at_least("repeats", self.repeats, 1)
        object.__setattr__(self, "options", Options(self.options))
        self.record.check_options("option", self.options)
        missing = self.record.required - self.options.keys()
        if missing:
            raise ValueError(f"defence {self.name!r} lacks {', '.join(sorted(missing))}")

    @classmethod
    def of(cls, given: "Setting | Mapping[str, Any]") -> "Setting":
        """The same, from {"name": …, "observer": …, "repeats": …} with the options beside them."""
        if isinstance(given, cls):
            return given
        if "name" not in given:
            raise ValueError(f"defence is {dict(given)!r}; it takes a name, one of {', '.join(DEFENCES)}")
        own = {name: given[name] for name in ("name", "observer", "repeats") if name in given}
        return cls(options=Options({n: v for n, v in given.items() if n not in own}), **own)

    @property
    def record(self) -> Defence:
        """What is known of the defence."""
        return DEFENCES[self.name]

    def noise_variance(self, seen: Observation) -> list[float]:
        """Variance of what its noise adds to an entry of Δ, one number per parameter; 0 for a defence without noise."""
        if self.record.variance is None:
            return [0.0] * len(seen.delta)
        return [variance / self.repeats for variance in self.record.variance(seen, self)]

    def kept(self, seen: Observation) -> list[torch.Tensor] | None:
        """Where Δ shows the update, one boolean tensor per parameter; None for a defence that leaves nothing out."""
        return kept(seen, self.record.acts_on == "update") if self.record.leaves_out else None


def kept(seen: Observation, of_update: bool) -> list[torch.Tensor]:
    """Where Δ shows the update, one boolean tensor per parameter: no weight was zeroed in a snapshot.

    ``of_update``: whether the update itself was sparsified. Then no entry that Δ leaves at zero counts; otherwise a weight that
    stayed is a derivative of zero, such as that of a black pixel's.
    """
    pairs = [(p, seen.weights_after[name].to(p.device)) for name, p in seen.model.named_parameters()]
    return [(p != 0) & (a != 0) & ((p != a) | (not of_update)) for p, a in pairs]


def _noise_variance(seen: Observation, setting: Setting) -> list[float]:
    unit = 2 if setting.options.get("distribution", "laplace") == "laplace" else 1
    snapshots = 2 if setting.observer == "channel" else 1
    clip, scale = setting.options.get("clip", 0.2), setting.options["scale"]
    factors = [float(undone_clip(p.detach(), clip)) for p in seen.model.parameters()]
    return [snapshots * unit * (factor * scale) ** 2 for factor in factors]


def _mechanism_variance(seen: Observation, setting: Setting) -> list[float]:
    std = setting.options["clip"] * setting.options.get("noise_multiplier", 0.0)
    return [std**2] * len(seen.delta)


def _grid_variance(seen: Observation, setting: Setting) -> list[float]:
    """On average over where an entry lies between two points of the grid."""
    bits = setting.options.get("bits", 8)
    return [float(grid_step(layer, bits)) ** 2 / 6 for layer in seen.delta]


@records.defence("noise", title="noise (released)", colour=0, marker="o", variance=_noise_variance)
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


@records.defence("sparsify", title="weight sparsification", colour=1, marker="s", random=False, leaves_out=True)
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


@records.defence("clip_and_noise", title="clipping and noise", colour=2, marker="D", acts_on="update", variance=_mechanism_variance)
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


@records.defence("top_k", title="top-k update", colour=3, marker="^", acts_on="update", random=False, leaves_out=True)
def top_k(update, *, percent):
    """Zero the ``percent`` % of the whole update's entries that are smallest in magnitude; the others stay as they are."""
    check.in_range("percent", percent, 0, 100)
    sizes = [layer.numel() for layer in update]
    every = torch.cat([layer.flatten() for layer in update])
    every[every.abs().argsort(stable=True)[: int(len(every) * percent / 100)]] = 0
    return [part.reshape(layer.shape) for part, layer in zip(every.split(sizes), update)]


@records.defence("quantise", title="quantised update", colour=4, marker="v", acts_on="update", variance=_grid_variance)
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


def defend(
    seen: Observation,
    defence: str | Callable[..., Any],
    *,
    observer: str = "channel",
    repeats: int = 1,
    seed: int = 0,
    **options: Any,
) -> Observation:
    """Return what remains visible when the client defends itself.

    Parameters
    ----------
    seen
        What would be seen without.
    defence
        A registered one, by key or as its function, or a function of your own (state dict, *, parameters, seed, and your
        ``options``) -> state dict, as ``noise`` is.
    observer
        "channel" sees both snapshots defended, each with its own noise (the released experiment; the client trains on its raw
        weights); "server" sent W_t itself and knows it exactly. Defences of Δ leave W_t public: no difference.
    repeats
        The observer averages so many answers of the client to the same W_t, each with noise of its own.
    seed
        Of the noise.
    **options
        Of the defence.

    Raises
    ------
    ValueError
        For arguments out of range, and where the defended snapshots no longer differ.
    """
    check.one_of("observer", observer, OBSERVERS)
    check.at_least("repeats", repeats, 1)
    record = _record(defence)
    record.check_options("option", options)
    names, before = seen.parameter_names, seen.model.state_dict()
    afters, befores = [], []
    for answer in range(repeats):
        draw = 2 * (seed + 10_007 * answer)
        own = [{"seed": draw}, {"seed": draw + 1}] if record.random else [{}, {}]
        if record.acts_on == "update":
            update = record.function(seen.delta, **own[1], **options)
            afters.append({**seen.weights_after, **_moved(before, names, update)})
        else:
            after = copy.deepcopy(seen.weights_after)
            afters.append(record.function(after, parameters=names, **own[1], **options))
            befores.append(record.function(copy.deepcopy(before), parameters=names, **own[0], **options))
    if not all(isinstance(weights, dict) for weights in afters + befores):
        raise ValueError(f"defence {record.key!r} returned no dict; it takes a state dict and returns one")
    model, equal = copy.deepcopy(seen.model), [1] * repeats
    if observer == "channel" and befores:
        model.load_state_dict(befores[0] if repeats == 1 else federated.average(befores, equal))
    after = afters[0] if repeats == 1 else federated.average(afters, equal)
    return Observation(model, after, seen.image_shape, seen.num_classes)


def _record(defence: str | Callable[..., Any]) -> Defence:
    """The record of a registered defence, or one made up for a function that is none: of snapshots, with a seed."""
    if isinstance(defence, str):
        check.one_of("defence", defence, DEFENCES)
        return DEFENCES[defence]
    registered = (record for record in DEFENCES.values() if record.function is defence)
    name = getattr(defence, "__name__", repr(defence))
    return next(registered, None) or Defence(key=name, function=defence, title=name)


def _moved(before: StateDict, names: Sequence[str], update: Update) -> StateDict:
    """The parameters after ``update``, in their own precision."""
    return {name: (before[name].double() - u).to(before[name].dtype) for name, u in zip(names, update)}


@check.renamed(rounds="num_rounds")
def epsilon(*, noise_multiplier, num_rounds, sample_rate=1.0, delta=1e-5):
    """ε of ``num_rounds`` Gaussian mechanisms at ``delta``, by Opacus' Rényi accountant; what is hidden is one clipped update.

    noise_multiplier  noise std over clip, of ``clip_and_noise`` or of DP-SGD.
    sample_rate       chance of each client (DP-SGD: example) to take part in a round, drawn independently.

    Raises ValueError for arguments out of range. Infinite where ``noise_multiplier`` is 0.
    """
    check.in_range("noise_multiplier", noise_multiplier, 0, math.inf)
    check.at_least("num_rounds", num_rounds, 1)
    check.in_range("sample_rate", sample_rate, 0, 1, open_low=True)
    check.in_range("delta", delta, 0, 1, open_low=True)
    if noise_multiplier == 0:
        return math.inf
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, num_rounds)]
    orders = [1.01, 1.02, 1.05, *RDPAccountant.DEFAULT_ALPHAS, *range(64, 2048, 16)]  # also for very small and large noise
    with warnings.catch_warnings():  # that a wider range of orders could give a smaller ε: it stays an upper bound
        warnings.filterwarnings("ignore", "Optimal order")
        return float(accountant.get_epsilon(delta, alphas=orders))


@check.renamed(lr="learning_rate", steps="local_steps")
def train_privately(
    model, images, labels, *, learning_rate, clip, noise_multiplier, local_steps=1, seed=0
):
    """Train as ``federated.train_locally`` does, by Opacus' DP-SGD (Abadi et al. 2016), all images in each step.

    Each image's gradient is scaled down to norm ``clip`` where it is longer; their sum gets N(0, (noise_multiplier·clip)²).
    """
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    check.in_range("learning_rate", learning_rate, 0, math.inf, open_low=True)
    check.in_range("clip", clip, 0, math.inf, open_low=True)
    check.in_range("noise_multiplier", noise_multiplier, 0, math.inf)
    client = copy.deepcopy(model)
    hooked = GradSampleModule(client)  # its hooks in the layers keep each image's own gradient
    settings = {"max_grad_norm": clip, "expected_batch_size": len(images), "noise_multiplier": noise_multiplier}
    generator = torch.Generator(device=images.device).manual_seed(seed)
    stepper = DPOptimizer(torch.optim.SGD(hooked.parameters(), lr=learning_rate), generator=generator, **settings)
    images = images.clone().requires_grad_()  # without, the hooks of the first layer warn
    return federated.descend(copy.deepcopy(model), client, stepper, images, labels, local_steps)


def _draw(distribution, shape, generator):
    """Unit-scale noise in float64, drawn on the CPU so that a seed means the same everywhere."""
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    first, second = (torch.empty(shape, dtype=torch.float64).exponential_(generator=generator) for _ in range(2))
    return first - second
