"""Defences: the two released ones, of a snapshot; common ones, of the update Δ; and their ε.

Nothing is changed in place. Of a snapshot (a state dict) only the tensors named in
``parameters`` are defended; buffers pass through. An update is a sequence of float64 tensors,
as ``Observation.delta``.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import nn

from dlm_core import check, federated, records
from dlm_core.observation import Observation
from dlm_core.records import DEFENCES, Defence, Options
from dlm_core.weights import StateDict

DISTRIBUTIONS = ("laplace", "gaussian")
OBSERVERS = ("channel", "server")
SUPPLIED = ("seed", "parameters")  # arguments of a defence that ``defend`` fills in
Update = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Setting:
    """A registered defence with its strength, as a value: what a client does and an attacker knows.

    Attributes
    ----------
    name
        Key of ``records.DEFENCES``.
    options
        Keyword arguments of that function, ``seed`` and ``parameters`` aside.
    observer
        "channel" sees both snapshots defended, each with its own noise; "server" sent W_t
        itself and knows it exactly.
    repeats
        The observer averages so many answers of the client to the same W_t.

    Raises
    ------
    ValueError
        For an unknown defence, observer or option, naming the near ones; for an option that is
        missing; for a defence that replaces the client's training.
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
        for name in SUPPLIED:
            if name in self.options:
                raise ValueError(
                    f"option of {self.name} {name!r} is no part of a setting: defend supplies it"
                )
        _check_options(self.record, self.options)

    @classmethod
    def of(cls, given: "Setting | Mapping[str, Any]") -> "Setting":
        """Return the same from a mapping.

        Parameters
        ----------
        given
            {"name": …, "observer": …, "repeats": …} with the defence's options beside them; a
            Setting is returned as it is.

        Raises
        ------
        ValueError
            Where ``given`` is no mapping or has no name, and as the class does.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping) or "name" not in given:
            known = ", ".join(DEFENCES)
            raise ValueError(
                f"defence is {given!r}; it takes a Setting or a dict with a name: {known}"
            )
        own = {name: given[name] for name in ("name", "observer", "repeats") if name in given}
        options = {name: value for name, value in given.items() if name not in own}
        return cls(options=Options(options), **own)

    @property
    def record(self) -> Defence:
        """What is known of the defence."""
        return DEFENCES[self.name]

    def defend(self, seen: Observation, seed: int) -> Observation:
        """What remains visible of ``seen`` under it, with noise drawn from ``seed``."""
        about: dict[str, Any] = {"observer": self.observer, "repeats": self.repeats}
        return defend(seen, self.name, seed=seed, **about, **self.options)

    def noise_variance(self, seen: Observation) -> list[float]:
        """Variance of what the defence's noise adds to an entry of Δ.

        Parameters
        ----------
        seen
            What the observer sees, defended.

        Returns
        -------
        list of float
            One number per parameter; 0 for a defence without noise.

        Raises
        ------
        ValueError
            Where the defence draws noise and its record does not tell the variance.
        """
        if self.record.variance is None:
            if self.record.random:
                raise ValueError(
                    f"defence {self.name!r} draws noise, and its record has no variance: add one, "
                    "or random=False where it draws none"
                )
            return [0.0] * len(seen.delta)
        return [variance / self.repeats for variance in self.record.variance(seen, self)]

    def kept(self, seen: Observation) -> list[torch.Tensor] | None:
        """Where Δ shows the update, as in ``kept``; None for a defence that leaves nothing out."""
        if not self.record.leaves_out:
            return None
        return kept(seen, self.record.acts_on == "update")


def kept(seen: Observation, of_update: bool) -> list[torch.Tensor]:
    """Where Δ shows the update: no weight was zeroed in a snapshot.

    Parameters
    ----------
    seen
        What the observer sees, sparsified.
    of_update
        Whether the update itself was sparsified. Then no entry that Δ leaves at zero counts.
        Otherwise a weight that stayed is a derivative of zero, such as that of a black pixel's.

    Returns
    -------
    list of torch.Tensor
        One boolean tensor per parameter, on the model's device.
    """
    masks = []
    for name, before in seen.model.named_parameters():
        after = seen.weights_after[name].to(before.device)
        mask = (before != 0) & (after != 0)
        if of_update:
            mask &= before != after
        masks.append(mask)
    return masks


def _noise_variance(seen: Observation, setting: Setting) -> list[float]:
    """Of ``noise``: its unit variance times (c · scale)², once for each snapshot that is noised."""
    unit = 2 if setting.options.get("distribution", "laplace") == "laplace" else 1
    snapshots = 2 if setting.observer == "channel" else 1
    clip, scale = setting.options.get("clip", 0.2), setting.options["scale"]
    factors = [float(undone_clip(p.detach(), clip)) for p in seen.model.parameters()]
    return [snapshots * unit * (factor * scale) ** 2 for factor in factors]


def _mechanism_variance(seen: Observation, setting: Setting) -> list[float]:
    """Of ``clip_and_noise``."""
    std = setting.options["clip"] * setting.options.get("noise_multiplier", 0.0)
    return [std**2] * len(seen.delta)


def _grid_variance(seen: Observation, setting: Setting) -> list[float]:
    """Of ``quantise``, on average over where an entry lies between two points of the grid."""
    bits = setting.options.get("bits", 8)
    return [float(grid_step(layer, bits)) ** 2 / 6 for layer in seen.delta]


@records.defence(
    "noise",
    title="noise (released)",
    colour=0,
    marker="o",
    acts_on="snapshot",
    variance=_noise_variance,
)
def noise(
    weights: StateDict,
    *,
    scale: float,
    distribution: str = "laplace",
    seed: int = 0,
    clip: float = 0.2,
    parameters: Sequence[str] | None = None,
) -> StateDict:
    """Add noise as the released code does: clip each tensor, add the noise, and undo the clip.

    Parameters
    ----------
    weights
        A state dict; it is left as it was.
    scale
        Of Laplace(0, scale) or N(0, scale²), at least 0; 0 changes nothing.
    distribution
        "laplace" or "gaussian".
    seed
        Of the noise.
    clip
        Largest norm of a tensor's rows, above 0.
    parameters
        Names of the tensors to defend; None takes all.

    Notes
    -----
    Each tensor is divided by c = max(1, largest row norm / clip), noised, and multiplied by c
    again. So the noise on the weights is c times its nominal scale, and the clip bounds
    nothing: there is no ε.
    """
    check.in_range("scale", scale, 0, math.inf)
    check.in_range("clip", clip, 0, math.inf, open_low=True)
    check.one_of("distribution", distribution, DISTRIBUTIONS)
    generator = torch.Generator().manual_seed(seed)
    defended = dict(weights)
    if scale == 0:
        return defended
    for name in weights if parameters is None else parameters:
        tensor = weights[name]
        factor = undone_clip(tensor, clip)
        draw = _draw(distribution, tensor.shape, generator).to(tensor)
        defended[name] = (tensor / factor + scale * draw) * factor
    return defended


def undone_clip(tensor: torch.Tensor, clip: float) -> torch.Tensor:
    """c = max(1, largest row norm / clip), the factor of ``noise``."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[None]
    return (rows.norm(dim=1).max() / clip).clamp(min=1)


@records.defence(
    "sparsify",
    title="weight sparsification",
    colour=1,
    marker="s",
    acts_on="snapshot",
    random=False,
    leaves_out=True,
)
def sparsify(
    weights: StateDict, *, percent: float, parameters: Sequence[str] | None = None
) -> StateDict:
    """Zero the ``percent`` % of each tensor's entries that are smallest in magnitude.

    Parameters
    ----------
    weights
        A state dict; it is left as it was.
    percent
        In [0, 100]; 0 changes nothing.
    parameters
        Names of the tensors to defend; None takes all.
    """
    check.in_range("percent", percent, 0, 100)
    defended = dict(weights)
    for name in weights if parameters is None else parameters:
        tensor = weights[name]
        ascending = tensor.abs().flatten().argsort(stable=True)
        dropped = ascending[: int(tensor.numel() * percent / 100)]
        defended[name] = tensor.clone()
        defended[name].view(-1)[dropped] = 0
    return defended


@records.defence(
    "clip_and_noise",
    title="clipping and noise",
    colour=2,
    marker="D",
    acts_on="update",
    variance=_mechanism_variance,
)
def clip_and_noise(
    update: Update, *, clip: float, noise_multiplier: float = 0.0, seed: int = 0
) -> list[torch.Tensor]:
    """The Gaussian mechanism: clip the update, then add normal noise in proportion to the clip.

    Parameters
    ----------
    update
        Δ, one tensor per parameter.
    clip
        C > 0; a longer update is scaled down to it, a shorter one stays.
    noise_multiplier
        z >= 0; the noise is N(0, (z · C)²).
    seed
        Of the noise.

    Notes
    -----
    Done by each client it is local differential privacy: its ε is ``epsilon(…,
    neighbours="replace")``. Central privacy (McMahan et al. 2018) adds the same noise once, to the
    sum of the clients' clipped updates, and hides whether a client took part (``neighbours="add or
    remove"``); the server then sees each of them with ``noise_multiplier`` 0.
    """
    check.in_range("clip", clip, 0, math.inf, open_low=True)
    check.in_range("noise_multiplier", noise_multiplier, 0, math.inf)
    generator = torch.Generator().manual_seed(seed)
    length = torch.stack([layer.norm() for layer in update]).norm()
    factor = (clip / length).clamp(max=1)
    scale = noise_multiplier * clip
    sent = []
    for layer in update:
        draw = _draw("gaussian", layer.shape, generator).to(layer)
        sent.append(factor * layer + scale * draw)
    return sent


@records.defence(
    "top_k",
    title="top-k update",
    colour=3,
    marker="^",
    acts_on="update",
    random=False,
    leaves_out=True,
)
def top_k(update: Update, *, percent: float) -> list[torch.Tensor]:
    """Zero the ``percent`` % of the whole update's entries that are smallest in magnitude.

    Parameters
    ----------
    update
        Δ, one tensor per parameter.
    percent
        In [0, 100]; 0 changes nothing. The entries that are kept stay as they are.
    """
    check.in_range("percent", percent, 0, 100)
    sizes = [layer.numel() for layer in update]
    every = torch.cat([layer.flatten() for layer in update])
    ascending = every.abs().argsort(stable=True)
    every[ascending[: int(len(every) * percent / 100)]] = 0
    return [part.reshape(layer.shape) for part, layer in zip(every.split(sizes), update)]


@records.defence(
    "quantise",
    title="quantised update",
    colour=4,
    marker="v",
    acts_on="update",
    variance=_grid_variance,
)
def quantise(update: Update, *, bits: int = 8, seed: int = 0) -> list[torch.Tensor]:
    """Round each entry at random to one of its two neighbours on a grid, without bias.

    Parameters
    ----------
    update
        Δ, one tensor per parameter.
    bits
        At least 2. The grid of a tensor has 2^bits - 1 points and ends at its largest magnitude.
    seed
        Of the rounding.

    Notes
    -----
    QSGD (Alistarh et al. 2017).
    """
    check.at_least("bits", bits, 2)
    generator = torch.Generator().manual_seed(seed)
    rounded = []
    for layer in update:
        step = grid_step(layer, bits)
        draw = torch.rand(layer.shape, generator=generator, dtype=torch.float64).to(layer)
        rounded.append((layer / step + draw).floor() * step)
    return rounded


def grid_step(tensor: torch.Tensor, bits: int) -> torch.Tensor:
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
        A registered one, by key or as its function, or a function of your own (state dict, by
        keyword parameters, seed, and your ``options``) -> state dict, as ``noise`` is.
    observer
        "channel" sees both snapshots defended, each with its own noise (the released
        experiment; the client trains on its raw weights); "server" sent W_t itself and knows it
        exactly. Defences of Δ leave W_t public: no difference.
    repeats
        The observer averages so many answers of the client to the same W_t, each with noise of
        its own.
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
    _check_options(record, options)
    before, names = seen.model.state_dict(), seen.parameter_names

    def sent(weights: StateDict, draw: int) -> StateDict:
        """``weights`` as ``record``, a defence of snapshots, leaves them."""
        own = {"seed": draw} if record.random else {}
        defended = record.function(copy.deepcopy(weights), parameters=names, **own, **options)
        if not isinstance(defended, dict):
            raise ValueError(
                f"defence {defence!r} returned no dict; it takes a state dict and returns one"
            )
        return defended

    def moved(draw: int) -> StateDict:
        """W_{t+1} after the update as ``record``, a defence of updates, leaves it."""
        own = {"seed": draw} if record.random else {}
        given = [layer.clone() for layer in seen.delta]
        update = record.function(given, **own, **options)
        steps = zip(names, update, strict=True)
        after = {n: (before[n].double() - u).to(before[n].dtype) for n, u in steps}
        return {**seen.weights_after, **after}

    draws = [2 * (seed + 10_007 * answer) for answer in range(repeats)]
    model = copy.deepcopy(seen.model)
    if record.acts_on == "update":
        return _observed(seen, model, [moved(draw + 1) for draw in draws])
    afters = [sent(seen.weights_after, draw + 1) for draw in draws]
    if observer == "channel":
        model.load_state_dict(_mean([sent(before, draw) for draw in draws]))
    return _observed(seen, model, afters)


def _observed(seen: Observation, model: nn.Module, afters: Sequence[StateDict]) -> Observation:
    """What an observer of ``model`` and of several answers to it holds."""
    return Observation(model, _mean(afters), seen.image_shape, seen.num_classes)


def _mean(snapshots: Sequence[StateDict]) -> StateDict:
    """The mean of several snapshots, and a single one to the bit."""
    if len(snapshots) == 1:
        return snapshots[0]
    return federated.average(snapshots, [1] * len(snapshots))


def _record(defence: str | Callable[..., Any]) -> Defence:
    """The record of a registered defence; for another function one of snapshots, with a seed."""
    if isinstance(defence, str):
        check.one_of("defence", defence, DEFENCES)
        return DEFENCES[defence]
    for record in DEFENCES.values():
        if record.function is defence:
            return record
    name = getattr(defence, "__name__", repr(defence))
    return Defence(key=name, function=defence, title=name)


def _check_options(record: Defence, options: Mapping[str, Any]) -> None:
    """Raise ValueError for unknown or missing options, and for a defence of the training."""
    if record.acts_on == "training":
        raise ValueError(
            f"defence {record.key!r} replaces the client's training: call "
            f"{record.function.__name__} instead of defending what a client sends"
        )
    record.check_options("option", options)
    record.check_told(options)


@check.renamed(rounds="num_rounds")
@check.arguments
def epsilon(
    *,
    noise_multiplier: Annotated[float, check.Range(0, 1e6)],
    num_rounds: Annotated[int, check.Range(1, 1e9)],
    neighbours: Literal["add or remove", "replace"],
    sample_rate: Annotated[float, check.Range(0, 1, open_low=True)] = 1.0,
    delta: Annotated[float, check.Range(0, 1, open_low=True, open_high=True)] = 1e-5,
) -> float:
    """ε of ``num_rounds`` Gaussian mechanisms at ``delta``, for whoever sees their sums.

    Parameters
    ----------
    noise_multiplier
        Noise std over clip, of ``clip_and_noise`` or of DP-SGD.
    num_rounds
        How often it is applied to the same data.
    neighbours
        What cannot be told apart. "add or remove": a sum with and without one clipped item, an
        update or, in DP-SGD, an image's gradient; it moves by at most the clip. "replace": a sum
        in which one item is another; it moves by at most twice the clip. Local differential privacy
        is the second: a client's own message is there in any case, and hides which one it is.
    sample_rate
        Chance of each item to take part in a round, drawn independently; below 1 for "add or
        remove" alone.
    delta
        δ.

    Returns
    -------
    float
        An upper bound by Opacus' Rényi accountant, at least 0; infinite without noise.

    Raises
    ------
    ValueError
        For arguments out of range.
    """
    if neighbours == "replace":
        if sample_rate < 1:
            raise ValueError(
                f"sample_rate is {sample_rate}; neighbours 'replace' takes 1: the accountant's "
                "bound for samples is for 'add or remove'"
            )
        noise_multiplier /= 2  # the clip is half of what the sum may move by
    if noise_multiplier < 1e-9:  # there ε has 18 digits, and then overflows
        return math.inf
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, num_rounds)]
    # also for very small and very large noise
    orders = [1.01, 1.02, 1.05, *RDPAccountant.DEFAULT_ALPHAS, *range(64, 2048, 16)]
    with warnings.catch_warnings():
        # It warns that more orders could give a smaller ε: this one stays an upper bound.
        warnings.filterwarnings("ignore", "Optimal order")
        # Its conversion from Rényi's divergence falls below 0 where δ is large.
        return max(0.0, float(accountant.get_epsilon(delta, alphas=orders)))


@records.defence("dp_sgd", title="DP-SGD", colour=5, marker="X", acts_on="training")
@check.renamed(lr="learning_rate", steps="local_steps")
def train_privately(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    learning_rate: float,
    clip: float,
    noise_multiplier: float,
    local_steps: int = 1,
    seed: int = 0,
) -> Observation:
    """Train as ``federated.train_locally`` does, by Opacus' DP-SGD (Abadi et al. 2016).

    Parameters
    ----------
    model, images, labels, learning_rate, local_steps
        As there; each step takes all images.
    clip
        C > 0; each image's gradient is scaled down to that norm where it is longer.
    noise_multiplier
        At least 0; the sum of the clipped gradients gets N(0, (noise_multiplier · C)²).
    seed
        Of the noise.

    Raises
    ------
    ValueError
        For arguments out of range, and for data that do not fit the model.
    """
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    check.in_range("learning_rate", learning_rate, 0, math.inf, open_low=True)
    check.in_range("clip", clip, 0, math.inf, open_low=True)
    check.in_range("noise_multiplier", noise_multiplier, 0, math.inf)
    client = copy.deepcopy(model)
    hooked = GradSampleModule(client)  # its hooks in the layers keep each image's own gradient
    stepper = DPOptimizer(
        torch.optim.SGD(hooked.parameters(), lr=learning_rate),
        noise_multiplier=noise_multiplier,
        max_grad_norm=clip,
        expected_batch_size=len(images),
        generator=torch.Generator(device=images.device).manual_seed(seed),
    )
    images = images.clone().requires_grad_()  # without, the hooks of the first layer warn
    return federated.descend(copy.deepcopy(model), client, stepper, images, labels, local_steps)


def _draw(distribution: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Unit-scale noise in float64, drawn on the CPU so that a seed means the same everywhere."""
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    first = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
    second = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
    return first - second
