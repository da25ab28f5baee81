"""Defences: the two released ones, of a snapshot; common ones, of the update Δ; and their ε.

Nothing is changed in place. Of a snapshot (a state dict) only the tensors named in
``parameters`` are defended; buffers pass through. An update is a sequence of float64 tensors,
as ``Observation.delta``.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import nn

from dlm_core import check, federated, records
from dlm_core.arrays import Images, Labels, for_model
from dlm_core.observation import Observation
from dlm_core.records import DEFENCES, Defence, Options, with_options
from dlm_core.weights import StateDict, check_fit

Distribution = Literal["laplace", "gaussian"]
Observer = Literal["channel", "server"]
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
        missing or out of its range; for a defence that replaces the client's training.
    """

    name: str
    options: Options = Options()
    observer: Observer = "channel"
    repeats: check.Count = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", Options(self.options))
        check.fields(self)
        check.one_of("defence", self.name, DEFENCES)
        for name in self.record.supplied:
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
        return with_options("defence", cls, given, DEFENCES)

    @property
    def record(self) -> Defence:
        """What is known of the defence."""
        return DEFENCES[self.name]

    @property
    def strength(self) -> dict[str, Any]:
        """All options of the defence: those given, and the defaults of the others."""
        every = self.record.parameters.values()
        defaults = {p.name: p.default for p in every if p.default is not p.empty}
        return {**defaults, **self.options}

    def defend(self, seen: Observation, seed: int) -> Observation:
        """What remains visible of ``seen`` under it, with noise drawn from ``seed``."""
        about: dict[str, Any] = {"observer": self.observer, "repeats": self.repeats}
        return defend(seen, self.name, seed=seed, **about, **self.options)

    def noise_variance(self, seen: Observation, received: nn.Module | None = None) -> list[float]:
        """Variance of what the defence's noise adds to an entry of Δ.

        Parameters
        ----------
        seen
            What the observer sees, defended.
        received
            The network as the client received it, where whoever asks knows it, as its owner does.
            None goes by what of it is seen.

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
        setting, snapshots = self, 1
        if received is not None and self._noises_both:
            # as to who knows W_t; what is seen of it has noise of its own
            seen = replace(seen, model=received)
            setting, snapshots = replace(self, observer="server"), 2
        variances = self.record.variance(seen, setting)
        return [snapshots * variance / self.repeats for variance in variances]

    @property
    def _noises_both(self) -> bool:
        """Whether W_t is defended as well."""
        return self.observer == "channel" and self.record.acts_on == "snapshot"

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
    """Of ``noise``: its unit variance times (c · scale)², once for each snapshot that is noised.

    On the channel W_t has noise as well, which lengthens its rows: c there is what the rows had
    without.
    """
    told = setting.strength
    unit = 2 if told["distribution"] == "laplace" else 1
    snapshots, added = 1, 0.0  # what noise adds to a clipped row's squared length, by its entries
    if setting.observer == "channel":
        snapshots, added = 2, unit * (told["scale"] / told["clip"]) ** 2 / setting.repeats
    variances = []
    for p in seen.model.parameters():
        length = p[0].numel() if p.ndim > 1 else p.numel()
        factor = float(undone_clip(p.detach() / math.sqrt(1 + length * added), told["clip"]))
        variances.append(snapshots * unit * (factor * told["scale"]) ** 2)
    return variances


def _mechanism_variance(seen: Observation, setting: Setting) -> list[float]:
    """Of ``clip_and_noise``."""
    std = setting.strength["clip"] * setting.strength["noise_multiplier"]
    return [std**2] * len(seen.delta)


def _grid_variance(seen: Observation, setting: Setting) -> list[float]:
    """Of ``quantise``, on average over where an entry lies between two points of the grid."""
    bits = setting.strength["bits"]
    return [float(grid_step(layer, bits)) ** 2 / 6 for layer in seen.delta]


@records.defence(
    "noise",
    title="noise (released)",
    colour=0,
    marker="o",
    acts_on="snapshot",
    variance=_noise_variance,
    example={"scale": 1e-3},
    neutral={"scale": 0.0},
)
@check.arguments
def noise(
    weights: StateDict,
    *,
    scale: check.NonNegative,
    distribution: Distribution = "laplace",
    seed: check.Whole = 0,
    clip: check.Positive = 0.2,
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
        Names of the tensors to defend; None takes all of floating point.

    Notes
    -----
    Each tensor is divided by c = max(1, largest row norm / clip), noised, and multiplied by c
    again. So the noise on the weights is c times its nominal scale, and the clip bounds
    nothing: there is no ε.
    """
    generator = torch.Generator().manual_seed(seed)
    defended = dict(weights)
    for name in _to_defend(weights, parameters) if scale else ():
        tensor = weights[name]
        factor = undone_clip(tensor, clip)
        draw = _draw(distribution, tensor.shape, generator).to(tensor)
        defended[name] = (tensor / factor + scale * draw) * factor
    return defended


def undone_clip(tensor: torch.Tensor, clip: float) -> torch.Tensor:
    """c = max(1, largest row norm / clip), the factor of ``noise``."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    return (_largest(rows.norm(dim=1)) / clip).clamp(min=1)


@records.defence(
    "sparsify",
    title="weight sparsification",
    colour=1,
    marker="s",
    acts_on="snapshot",
    random=False,
    leaves_out=True,
    example={"percent": 30.0},
    neutral={"percent": 0.0},
)
@check.arguments
def sparsify(
    weights: StateDict, *, percent: check.Percent, parameters: Sequence[str] | None = None
) -> StateDict:
    """Zero the ``percent`` % of each tensor's entries, rounded down, that are smallest in
    magnitude.

    Parameters
    ----------
    weights
        A state dict; it is left as it was.
    percent
        In [0, 100]; 0 changes nothing.
    parameters
        Names of the tensors to defend; None takes all of floating point.
    """
    defended = dict(weights)
    for name in _to_defend(weights, parameters):
        dropped = _smallest(weights[name].flatten(), percent)
        defended[name] = weights[name].masked_fill(dropped.view(weights[name].shape), 0)
    return defended


@records.defence(
    "clip_and_noise",
    title="clipping and noise",
    colour=2,
    marker="D",
    acts_on="update",
    variance=_mechanism_variance,
    example={"clip": 0.1, "noise_multiplier": 0.1},
    neutral={"clip": 1e6},
)
@check.arguments
def clip_and_noise(
    update: Update,
    *,
    clip: check.Positive,
    noise_multiplier: check.NonNegative = 0.0,
    seed: check.Whole = 0,
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
    if not update:
        return []
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
    example={"percent": 30.0},
    neutral={"percent": 0.0},
)
@check.arguments
def top_k(update: Update, *, percent: check.Percent) -> list[torch.Tensor]:
    """Zero the ``percent`` % of the whole update's entries, rounded down, that are smallest in
    magnitude.

    Parameters
    ----------
    update
        Δ, one tensor per parameter.
    percent
        In [0, 100]; 0 changes nothing. The entries that are kept stay as they are.
    """
    if not update:
        return []
    dropped = _smallest(torch.cat([layer.flatten() for layer in update]), percent)
    parts = zip(dropped.split([layer.numel() for layer in update]), update)
    return [layer.masked_fill(part.view(layer.shape), 0) for part, layer in parts]


@records.defence(
    "quantise",
    title="quantised update",
    colour=4,
    marker="v",
    acts_on="update",
    variance=_grid_variance,
    example={"bits": 6},
)
@check.arguments
def quantise(
    update: Update, *, bits: Annotated[int, check.Range(2, 53)] = 8, seed: check.Whole = 0
) -> list[torch.Tensor]:
    """Round each entry at random to one of its two neighbours on a grid, without bias.

    Parameters
    ----------
    update
        Δ, one tensor per parameter.
    bits
        From 2 to float64's 53. The grid of a tensor has 2^bits - 1 points and ends at its largest
        magnitude.
    seed
        Of the rounding.

    Notes
    -----
    QSGD (Alistarh et al. 2017).
    """
    generator = torch.Generator().manual_seed(seed)
    rounded = []
    for layer in update:
        step = grid_step(layer, bits)
        draw = torch.rand(layer.shape, generator=generator, dtype=torch.float64).to(layer.device)
        rounded.append(((layer.double() / step + draw).floor() * step).to(layer.dtype))
    return rounded


def grid_step(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Distance of two points of the grid on which ``quantise`` puts a tensor, in float64."""
    return _largest(tensor.double().abs()).clamp(min=1e-300) / (2 ** (bits - 1) - 1)


def _to_defend(weights: StateDict, parameters: Sequence[str] | None) -> Sequence[str]:
    """Names of the tensors that a defence of snapshots changes."""
    if parameters is None:
        return [name for name, tensor in weights.items() if tensor.is_floating_point()]
    for name in parameters:
        check.one_of("parameters", name, weights)
    return parameters


def _smallest(entries: torch.Tensor, percent: float) -> torch.Tensor:
    """Where the ``percent`` % of the entries lie that are smallest in magnitude; the first of
    equals.
    """
    # 0.57 % of 10,000 is 57, where the product of floating-point numbers is less by a hair
    count = math.floor(round(len(entries) * percent / 100, 6))
    where = torch.zeros_like(entries, dtype=torch.bool)
    where[entries.abs().argsort(stable=True)[:count]] = True
    return where


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest of values of at least 0, or 0 where there are none."""
    return values.max() if values.numel() else values.new_zeros(())


@check.arguments
def defend(
    seen: Observation,
    defence: str | Callable[..., Any],
    *,
    observer: Observer = "channel",
    repeats: check.Count = 1,
    seed: check.Whole = 0,
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
        For arguments out of range, for what is no snapshot or no update, and where the defended
        snapshots no longer differ.
    FloatingPointError
        Where what the defence leaves overflows.
    """
    record = _record(defence)
    _check_options(record, options)
    before, names = seen.model.state_dict(), seen.parameter_names
    what = f"what defence {record.key!r} returned"
    shared = _shared(seen.model)

    def sent(weights: StateDict, draw: int) -> StateDict:
        """``weights`` as ``record``, a defence of snapshots, leaves them."""
        own = {"seed": draw} if record.random else {}
        defended = record.function(copy.deepcopy(weights), parameters=names, **own, **options)
        check_fit(what, check.fitting(what, defended, dict), weights)
        return _finite(what, {**defended, **{name: defended[own] for name, own in shared.items()}})

    def moved(draw: int) -> StateDict:
        """W_{t+1} after the update as ``record``, a defence of updates, leaves it."""
        own = {"seed": draw} if record.random else {}
        given = [layer.clone() for layer in seen.delta]
        update = check.fitting(what, record.function(given, **own, **options), Update)
        shapes = [[tuple(layer.shape) for layer in each] for each in (update, seen.delta)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{what} has shapes {shapes[0]}; it takes an update and returns one: {shapes[1]}"
            )
        steps = zip(names, update)
        after = {n: (before[n].double() - u).to(before[n].dtype) for n, u in steps}
        after |= {name: after[own] for name, own in shared.items()}
        return _finite(what, {**seen.weights_after, **after})

    draws = [2 * (seed + 10_007 * answer) for answer in range(repeats)]
    model = copy.deepcopy(seen.model)
    if record.acts_on == "update":
        return _observed(seen, model, [moved(draw + 1) for draw in draws])
    afters = [sent(seen.weights_after, draw + 1) for draw in draws]
    if observer == "channel":
        model.load_state_dict(_mean([sent(before, draw) for draw in draws]))
    return _observed(seen, model, afters)


def _shared(model: nn.Module) -> dict[str, str]:
    """{name in the state dict: the parameter's own}, of tensors that layers share: a defence is
    given one of their names.
    """
    own = {id(p): name for name, p in model.named_parameters()}
    every = model.state_dict(keep_vars=True).items()
    names = {name: own.get(id(tensor), name) for name, tensor in every}
    return {name: first for name, first in names.items() if name != first}


def _finite(what: str, weights: StateDict) -> StateDict:
    """The weights, where they are finite."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{what} overflows {tensor.dtype} in {name!r}")
    return weights


def _observed(seen: Observation, model: nn.Module, afters: Sequence[StateDict]) -> Observation:
    """What an observer of ``model`` and of several answers to it holds."""
    name = seen.head.names[0].rpartition(".")[0]
    return Observation(model, _mean(afters), seen.image_shape, seen.num_classes, name)


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
    """Raise ValueError for unknown, missing or wrong options, for a defence of the training, and
    for a function that does not take what ``defend`` gives it.
    """
    if record.acts_on == "training":
        raise ValueError(
            f"defence {record.key!r} replaces the client's training: call "
            f"{record.function.__name__} instead of defending what a client sends"
        )
    record.check_options("option", options)
    record.check_told(options)
    record.check_values(options)
    given = {"seed": record.random, "parameters": record.acts_on == "snapshot"}
    takes = inspect.signature(record.function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for name in given:
        if given[name] and name not in takes and not open_ended:
            raise ValueError(
                f"defence {record.key!r} takes no {name}, and defend gives it one: a defence of "
                "snapshots takes parameters, and one that is registered as random a seed"
            )


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


@records.defence(
    "dp_sgd",
    title="DP-SGD",
    colour=5,
    marker="X",
    acts_on="training",
    example={"learning_rate": 0.05, "clip": 0.1, "noise_multiplier": 0.1},
    neutral={"learning_rate": 0.05, "clip": 1e6, "noise_multiplier": 0.0},
)
@check.renamed(lr="learning_rate", steps="local_steps")
@check.arguments
def train_privately(
    model: nn.Module,
    images: Images,
    labels: Labels,
    *,
    learning_rate: check.Positive,
    clip: check.Positive,
    noise_multiplier: check.NonNegative,
    local_steps: check.Count = 1,
    seed: check.Whole = 0,
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
        For arguments out of range, for data that do not fit the model, and for a model that Opacus
        cannot train, such as one with batch normalisation.
    """
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    client = copy.deepcopy(model)
    try:
        hooked = GradSampleModule(client)  # its hooks in the layers keep each image's own gradient
    except NotImplementedError:
        raise ValueError(
            "model has a layer that Opacus' DP-SGD does not take, such as batch normalisation"
        ) from None
    images = for_model(images, model).clone().requires_grad_()  # else the first layer's hooks warn
    stepper = DPOptimizer(
        torch.optim.SGD(hooked.parameters(), lr=learning_rate),
        noise_multiplier=noise_multiplier,
        max_grad_norm=clip,
        expected_batch_size=len(images),
        generator=torch.Generator(device=images.device).manual_seed(seed),
    )
    try:
        return federated.descend(copy.deepcopy(model), client, stepper, images, labels, local_steps)
    except ValueError:
        trained = {n: p for n, p in client.named_parameters() if p.requires_grad}
        unused = [n for n, p in trained.items() if getattr(p, "grad_sample", None) is None]
        if 0 < len(unused) < len(trained):
            raise ValueError(
                f"model does not use {unused[0]!r}; Opacus' DP-SGD takes it frozen alone"
            ) from None
        raise


def _draw(distribution: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Unit-scale noise in float64, drawn on the CPU so that a seed means the same everywhere."""
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    first = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
    second = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
    return first - second
