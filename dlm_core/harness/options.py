"""The options that a client has against leakage: what each costs, guarantees and hides.

Notebooks 18 and 20 ask the same trainings and the same attacks of these.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dlm_core import check, defenses
from dlm_core.defenses import Setting
from dlm_core.harness import sweeps, tables
from dlm_core.harness.all_rounds import Watched
from dlm_core.harness.trials import Trial
from dlm_core.harness.utility import Federation, Training
from dlm_core.records import Options

MLP: dict[str, Any] = {"model": "mlp", "model_options": {"init": "default"}}
CLIP = 1.0  # norm to which a client's update, or in DP-SGD an image's gradient, is scaled down
DELTA = 1e-5

Strategy = tuple[str, Mapping[str, Any]]  # key of ``records.ATTACKS``, and its options
ON_ONE_IMAGE: dict[str, Sequence[Strategy]] = {
    "undefended": (("dlm_plus", {}), ("exact", {})),
    "defended": (
        ("dlm_plus", {}),
        ("aware_dlm_plus", {}),
        ("aware_exact", {}),
        ("aware_exact", {"max_steps": 0}),  # without the fit, which zeros can lead astray
    ),
}


@dataclass(frozen=True, kw_only=True)
class Option:
    """A defence of one strength, or none.

    Attributes
    ----------
    family
        The name of the defence, whatever its strength.
    strength
        As the family counts it; NaN for none.
    training
        The federated training in which every client takes this option.
    shown
        The defence of what the server sees of a client who takes one step on one image.
    epsilon
        Of the whole training; infinite where nothing random bounds a client's influence.
    neighbours
        What that ε cannot tell apart; empty where it is infinite.
    """

    family: str
    strength: float
    training: Federation
    shown: Setting | None = None
    epsilon: float = math.inf
    neighbours: str = ""

    def __post_init__(self) -> None:
        check.fields(self)

    @check.arguments
    def trainings(self, seeds: check.Count) -> list[Federation]:
        """The training from ``seeds`` seeds."""
        return [replace(self.training, seed=seed) for seed in range(seeds)]

    @check.arguments
    def shown_to(self, observer: defenses.Observer) -> Setting | None:
        """``shown``, to the "server" or on the "channel"; W_t is public where Δ is defended."""
        if self.shown is None or self.shown.record.acts_on != "snapshot":
            return self.shown
        return replace(self.shown, observer=observer)


@check.arguments
def federation(dataset: str, num_rounds: check.Count) -> Federation:
    """The training that options are priced in: five clients, each with three steps on 96 images."""
    client = Training(learning_rate=1.0, local_steps=3, batch_size=96)
    return Federation(dataset=dataset, num_clients=5, num_rounds=num_rounds, client=client, **MLP)


@check.arguments
def in_colour(num_rounds: check.Count, dataset: str = "cifar100") -> Federation:
    """The same for colour images, on a LeNet with ReLU. It takes the full set (data/README.md)."""
    client = Training(learning_rate=0.1, local_steps=20, batch_size=96)
    lenet = {"model": "lenet", "model_options": {"init": "default", "activation": "relu"}}
    about: dict[str, Any] = {"dataset": dataset, "num_rounds": num_rounds, **lenet}
    return Federation(num_clients=5, client=client, **about)


@check.arguments
def undefended(training: Federation) -> Option:
    """No defence, which costs nothing."""
    return Option(family="none", strength=math.nan, training=training)


@check.arguments
def menu(
    training: Federation,
    *,
    scales: Sequence[check.NonNegative] = (),
    percents: Sequence[check.Percent] = (),
    multipliers: Sequence[check.NonNegative] = (),
    dp_sgd: Sequence[check.NonNegative] = (),
    kept_out: Sequence[check.Percent] = (),
    bits: Sequence[check.Count] = (),
) -> list[Option]:
    """Return the options, family by family.

    Parameters
    ----------
    training
        Without defence, as of ``federation``.
    scales
        Nominal, of the released noise.
    percents
        Of each tensor of weights, zeroed.
    multipliers
        Noise std over ``CLIP`` of each client's clipped update. Done by the server (central
        privacy), the noise is that of the same mean: √clients times the multiplier, once.
    dp_sgd
        Noise multipliers of DP-SGD.
    kept_out
        Percent of the update that top-k zeroes.
    bits
        Of a quantised update.
    """
    return [
        *_plain(training, "released noise", "noise", "scale", scales),
        *_plain(training, "weight sparsification", "sparsify", "percent", percents),
        *(_local(training, multiplier) for multiplier in multipliers),
        *(_central(training, multiplier) for multiplier in multipliers),
        *(_dp_sgd(training, multiplier) for multiplier in dp_sgd),
        *_plain(training, "top-k update", "top_k", "percent", kept_out),
        *_plain(training, "quantised update", "quantise", "bits", bits),
    ]


def _plain(
    training: Federation, family: str, defence: str, argument: str, strengths: Sequence[float]
) -> list[Option]:
    """One registered defence, which the server sees as the clients apply it; no ε."""
    found = []
    for strength in strengths:
        setting = Setting(defence, Options({argument: strength}), observer="server")
        defended = replace(training, defence=setting)
        found.append(Option(family=family, strength=strength, training=defended, shown=setting))
    return found


def _clipped(clip: float, **noise: float) -> Setting:
    return Setting("clip_and_noise", Options(clip=clip, **noise), observer="server")


def _local(training: Federation, multiplier: float) -> Option:
    setting = _clipped(CLIP, noise_multiplier=multiplier)
    return Option(
        family="clipping and noise, local",
        strength=multiplier,
        training=replace(training, defence=setting),
        shown=setting,
        epsilon=_epsilon(multiplier, training.num_rounds, "replace"),
        neighbours="replace an update",
    )


def _central(training: Federation, multiplier: float) -> Option:
    """The server adds the noise, and sees the clipped updates without it: ε holds for whoever sees
    the mean.
    """
    of_the_sum = multiplier * math.sqrt(training.num_clients)
    setting = _clipped(CLIP, noise_multiplier=multiplier)
    return Option(
        family="clipping and noise, central",
        strength=of_the_sum,
        training=replace(training, defence=setting),
        shown=_clipped(CLIP),
        epsilon=_epsilon(of_the_sum, training.num_rounds, "add or remove"),
        neighbours="add or remove a client",
    )


def _dp_sgd(training: Federation, multiplier: float) -> Option:
    """On one image and in one step it is clipping and noise of the update."""
    how = training.client
    client = replace(how, batch_size=None, clip=CLIP, noise_multiplier=multiplier)
    return Option(
        family="DP-SGD",
        strength=multiplier,
        training=replace(training, client=client),
        shown=_clipped(how.learning_rate * CLIP, noise_multiplier=multiplier),
        epsilon=_epsilon(multiplier, training.num_rounds * how.local_steps, "add or remove"),
        neighbours="add or remove an image",
    )


def _epsilon(
    multiplier: float, times: int, neighbours: Literal["add or remove", "replace"]
) -> float:
    return defenses.epsilon(
        noise_multiplier=multiplier, num_rounds=times, neighbours=neighbours, delta=DELTA
    )


@check.arguments
def accuracies(choices: Iterable[Option], seeds: check.Count) -> dict[Option, list[float]]:
    """Train under each option, and return the accuracies, one a seed."""
    plans = {option: option.trainings(seeds) for option in choices}
    plan = [training for trainings in plans.values() for training in trainings]
    records = sweeps.sweep(plan)
    reached = {each: record["accuracy"] for each, record in zip(plan, records)}
    return {option: [reached[each] for each in trainings] for option, trainings in plans.items()}


@check.arguments
def price(
    before: Sequence[check.Finite], after: Sequence[check.Finite]
) -> tuple[float, float, float]:
    """Points of accuracy lost between trainings of the same seeds: (mean, low, high) as of
    ``tables.interval``.
    """
    if len(before) != len(after):
        raise ValueError(f"after has {len(after)} accuracies; before has {len(before)}")
    return tables.interval([100 * (b - a) for b, a in zip(before, after)])


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A kind of client that is attacked, and the attacks on it.

    Attributes
    ----------
    trial
        Its client, images, network and data set.
    number
        How many are attacked. Number i has the images from i on, so that batches overlap, and a
        network and noise of its own.
    undefended, defended
        The attacks in either case; the first of each knows of no defence.
    """

    trial: Trial
    number: check.Count
    undefended: Sequence[Strategy] = ON_ONE_IMAGE["undefended"]
    defended: Sequence[Strategy] = ON_ONE_IMAGE["defended"]

    def __post_init__(self) -> None:
        check.fields(self)

    @property
    def told(self) -> dict[str, Any]:
        """What an attacker who simulates this client is told of it: for several images the labels
        as well.
        """
        client = self.trial.client
        how = {"learning_rate": client.learning_rate, "local_steps": client.local_steps}
        return {**how, "labels": "given"} if self.trial.num_images > 1 else how

    def trials(
        self,
        attack: str,
        attack_options: Mapping[str, Any] | None = None,
        defence: Setting | None = None,
    ) -> list[Trial]:
        """One attack on each of them."""
        options = Options(attack_options)
        one = replace(self.trial, attack=attack, attack_options=options, defence=defence)
        return [replace(one, index=i, seed=i) for i in range(self.number)]

    def attacks(self, defence: Setting | None) -> dict[tuple[str, Options], list[Trial]]:
        """{(attack, its options): trials} of all attacks that apply; the last has a learned prior,
        where there is one for the data set.
        """
        strategies = self.undefended if defence is None else self.defended
        if defence is not None and self.trial.dataset == "digits":
            strategies = [*strategies, ("learned_prior", self.told)]
        return {
            (attack, Options(how)): self.trials(attack, how, defence) for attack, how in strategies
        }


@check.arguments
def over_rounds(
    option: Option, victim: Victim, *, networks: check.Count = 5, every: check.Count = 1
) -> dict[tuple[str, Options], list[Watched]]:
    """{("all rounds, " and the attack, its options): one for each client} of a server that keeps
    the rounds of a training.

    One attack fits all answers jointly, with the learned prior. The other averages them, as if W_t
    had stood still, and divides: for one image, whose quotient at the first layer is the same in
    each round.

    Parameters
    ----------
    option
        Whose training is watched; one with a defence, of digits.
    victim
        The clients.
    networks
        Trainings, of so many seeds; the clients take them in turn.
    every
        The joint fit takes each so many-th round; the average takes all.
    """
    if option.shown is None:
        raise ValueError("option has no defence; one round shows what all do")
    attacks: dict[tuple[str, Options], dict[str, Any]] = {
        ("learned_prior", Options(victim.told)): {"every": every}
    }
    if victim.trial.num_images == 1:
        attacks["aware_exact", Options(max_steps=0)] = {"averaged": True}
    client: dict[str, Any] = {
        "num_images": victim.trial.num_images,
        "local_steps": victim.trial.client.local_steps,
    }
    return {
        (f"all rounds, {attack}", told): [
            Watched(
                training=replace(option.training, seed=i % networks),
                shown=option.shown,
                attack=attack,
                attack_options=told,
                index=i,
                **client,
                **how,
            )
            for i in range(victim.number)
        ]
        for (attack, told), how in attacks.items()
    }


@dataclass(frozen=True, kw_only=True)
class Leak:
    """What the strongest of several attacks sees.

    Attributes
    ----------
    attack, attack_options
        The one of the highest median.
    psnr, psnr_max
        Its median and its highest, in dB.
    psnr_unaware
        Median of the first attack, which knows of no defence.
    """

    attack: str
    attack_options: Options
    psnr: float
    psnr_max: float
    psnr_unaware: float


def psnrs(trials: Iterable[Any]) -> dict[Any, float]:
    """Run the trials, ``Trial`` or ``Watched``: PSNR in dB of each; -inf, the worst, of one without
    a picture.
    """
    plan = list(dict.fromkeys(trials))
    return {each: record.get("psnr", -math.inf) for each, record in zip(plan, sweeps.sweep(plan))}


def median(trials: Iterable[Any], psnr: Mapping[Any, float]) -> float:
    """Median PSNR of the trials, in dB; -inf where it falls on one without a picture."""
    import pandas

    middle = tables.quantile(pandas.Series([psnr[trial] for trial in trials]), 0.5)
    return -math.inf if math.isnan(middle) else middle


def strongest(
    attacks: Mapping[tuple[str, Options], Sequence[Any]], psnr: Mapping[Any, float]
) -> Leak:
    """The attack of the highest median among those of ``Victim.attacks``, as ``psnrs`` has them."""
    medians = {name: median(trials, psnr) for name, trials in attacks.items()}
    best = max(medians, key=lambda name: medians[name])
    return Leak(
        attack=best[0],
        attack_options=best[1],
        psnr=medians[best],
        psnr_max=max(psnr[trial] for trial in attacks[best]),
        psnr_unaware=next(iter(medians.values())),
    )


def highest(attacks: Mapping[Any, Sequence[Any]], psnr: Mapping[Any, float]) -> Any:
    """A table of the attacked clients, one row each, as ``harness.evidence`` takes it: "psnr" is
    the highest of any attack on that client. Which that is, the truth says: no attacker knows it,
    and so knowing more never loses to knowing less.

    Parameters
    ----------
    attacks
        Trials of each attack on the same clients in the same order, as of ``Victim.attacks``; of
        the first attack ``trials.Trial``, of others ``Watched`` too.
    psnr
        As ``psnrs`` has it.
    """
    import pandas

    names = ("dataset", "index", "num_images", "model", "seed")
    rows = [
        {
            **{name: getattr(same[0], name) for name in names},
            "psnr": max(psnr[each] for each in same),
        }
        for same in zip(*attacks.values(), strict=True)
    ]
    return pandas.DataFrame(rows)
