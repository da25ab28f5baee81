"""The released experiments, in their settings: the trials of each script, by its name.

``docs/released.md`` has them in a table, which a test compares with the trials made here. All run
in float32 on pixels from N(0, 1), never stop early, and return their last point; one that meets a
NaN has diverged there. Each trial has a network and a start of its own.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from dlm_core import check, data, records
from dlm_core.defenses import Setting
from dlm_core.harness.trials import Client, Trial
from dlm_core.records import Options

DATASET = "cifar100"
# Where a script observes the gradient itself: at rate 1 it is Δ, to 1e-16 where W_t - g is kept in
# float64; a snapshot in float32 would round it to 1e-8 of the weights, where gradients may be less.
GRADIENT = Client(learning_rate=1.0, dtype="float64")
# Evaluations in one step of an optimizer, at most; one where not said.
EVALUATIONS = {"released_lbfgs": 25}
AUTHORS_IG = "IG, its authors'"
ON_THE_WAY = 20  # evaluations between pictures, of searches that notebook 02 follows
OWN = ("network", "n", "source", "iterations", "keep_every")  # options of all scripts' trials
# What ``search`` says of a trial.
AS_RELEASED, ALIKE, AUTHORS = "as released", "released search", "its authors'"
SHORTENED = "shortened"


class Search(NamedTuple):
    """A script's optimizer on one network.

    Attributes
    ----------
    optimizer
        As a trial names it.
    iterations
        Its steps; one of L-BFGS is up to 20 of its own.
    """

    optimizer: str
    iterations: int


@dataclass(frozen=True, kw_only=True)
class Script:
    """A row of the table: one script, or one part of it.

    Attributes
    ----------
    attack
        Key of ``records.ATTACKS``, with ``options`` that never vary.
    labels
        "optimised", "given", or "last": the last image's for all.
    client
        Whose update is observed.
    searches
        {network: how it is searched}.
    part
        Where in the trial ``varied`` stands.
    varied
        {name: its released values}, each combination of which is run.
    defence
        Key of ``records.DEFENCES``, of both snapshots; None for no defence.
    images
        Where they begin in CIFAR-100's training set, each the first of ``num_images``.
    num_images
        In the client's step.
    repeats
        Attacks for each combination of ``varied``.
    keep_every
        How many evaluations lie between the pictures kept on the way; None keeps none.
    """

    attack: str
    labels: str
    client: Client
    searches: Mapping[str, Search]
    options: Options = Options()
    part: Literal["attack_options", "client", "defence"] = "attack_options"
    varied: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defence: str | None = None
    images: range = range(60, 61)
    num_images: int = 1
    repeats: int = 1
    keep_every: int | None = None

    def trial(self, network: str, iterations: int | None = None, **varied: Any) -> Trial:
        """One attack on the first bundled images, with these values of what varies.

        Parameters
        ----------
        network
            Of ``searches``.
        iterations
            Other than the released number.
        **varied
            All names of ``varied``.
        """
        optimizer, released = self.searches[network]
        steps = iterations or released
        parts: dict[str, dict[str, Any]] = {
            "attack_options": {
                **self.options,
                "labels": self.labels,
                "optimizer": optimizer,
                "coordinates": "pixels",
                "dtype": "float32",
                "whole_budget": True,
                "max_iterations": steps,
                # more than its steps need: the budget of evaluations ends a search before the step
                "max_evaluations": EVALUATIONS.get(optimizer, 1) * steps + 1,
            },
            "client": {},
            "defence": {},
        }
        parts[self.part] |= varied
        defence = None
        if self.defence is not None:
            defence = Setting(self.defence, Options(parts["defence"]), observer="channel")
        return Trial(
            attack=self.attack,
            attack_options=Options(parts["attack_options"]),
            dataset=DATASET,
            num_images=self.num_images,
            model=network,
            client=replace(self.client, **parts["client"]),
            defence=defence,
        )


def _searches(lenet: int, mlp: int, adam: str = "adam") -> dict[str, Search]:
    return {"lenet": Search("released_lbfgs", lenet), "mlp": Search(adam, mlp)}


# What the parts of dlm_defense share.
DEFENDED = Script(
    attack="dlm_plus",
    labels="optimised",
    client=Client(learning_rate=0.1),
    searches=_searches(200, 5000),
    repeats=5,
)
# {name: script}, and last what IG's own authors run.
SCRIPTS: dict[str, Script] = {
    "DLG_k": Script(
        attack="dlg",
        options=Options(learning_rate=1.0),
        labels="optimised",
        client=GRADIENT,
        searches=_searches(300, 10_000),
        repeats=100,
        keep_every=ON_THE_WAY,
    ),
    "DLG_k with a factor": Script(
        attack="dlg_factor",
        options=Options(learning_rate=1.0),
        labels="optimised",
        client=GRADIENT,
        searches=_searches(300, 10_000),
        varied={"k0": (0.9, 0.95, 1.05, 1.1)},
        repeats=100,
    ),
    "DLM": Script(
        attack="dlm",
        options=Options(relative=False),
        labels="optimised",
        client=Client(learning_rate=0.01),
        searches=_searches(200, 5000),
        varied={"k0": tuple(range(60, 241, 20))},
        repeats=10,
        keep_every=ON_THE_WAY,
    ),
    "DLM_plus": Script(
        attack="dlm_plus",
        labels="given",
        client=Client(learning_rate=0.01),
        searches=_searches(200, 5000, "slow_adam"),
        keep_every=ON_THE_WAY,
    ),
    "Cosine": Script(
        attack="inverting_gradients",
        options=Options(total_variation=0.0),
        labels="optimised",
        client=replace(GRADIENT, label=25),
        searches={"lenet": Search("released_lbfgs", 200)},
        images=range(60, 110),
        repeats=50,
        keep_every=ON_THE_WAY,
    ),
    "DLM_PLUS_EXAMPLE": Script(
        attack="dlm_plus",
        labels="last",
        client=Client(learning_rate=0.1),
        searches=_searches(50, 50),
        images=range(90, 91),
        num_images=2,
    ),
    "dlm_defense noise": replace(
        DEFENDED,
        defence="noise",
        part="defence",
        varied={
            "distribution": ("laplace", "gaussian"),
            "scale": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        },
    ),
    "dlm_defense sparsification": replace(
        DEFENDED, defence="sparsify", part="defence", varied={"percent": tuple(range(10))}
    ),
    "dlm_defense local steps": replace(
        DEFENDED,
        client=Client(learning_rate=0.1, clear_gradients=False),
        part="client",
        varied={"local_steps": (1, 20, 40, 60, 80, 100)},
    ),
    # Geiping et al. 2020, reconstruct_image.py of github.com/JonasGeiping/invertinggradients:
    # signed Adam at 0.1 with three drops, boxed, one start; the label is told.
    AUTHORS_IG: Script(
        attack="inverting_gradients",
        labels="given",
        client=GRADIENT,
        searches={network: Search("signed_adam", 24_000) for network in ("lenet", "mlp")},
        varied={"total_variation": (1e-4,)},
        keep_every=100,
    ),
}


@check.arguments
def trials(
    script: str,
    *,
    network: str = "lenet",
    n: check.Count | None = None,
    source: str = "auto",
    iterations: check.Count | None = None,
    keep_every: check.Count | None = None,
    **varied: Any,
) -> list[Trial]:
    """The trials of a released script, for ``sweeps.sweep``.

    Parameters
    ----------
    script
        Key of ``SCRIPTS``; "IG, its authors'" is not of the release, but what Inverting Gradients'
        own authors run.
    network
        "lenet" or "mlp"; of Cosine "lenet" alone.
    n
        Repeats for each value of what varies, from seeds 0, 1, …; by default as many as released.
    source
        Of ``data.load``. With "full" the images are the released ones; of the bundled set they are
        the first, the second, … in turn, and so are the batches.
    iterations
        Fewer than released, for a look: the trials are then no longer as released.
    keep_every
        Of ``search.reconstruct``; it changes no result. By default the script's, so that a trial
        in two notebooks is one.
    **varied
        What the script varies, one value or a list: "k0", "scale", "distribution", "percent",
        "local_steps"; by default the released ones.

    Raises
    ------
    ValueError
        For an unknown script, for a network that it does not attack, and for anything that it does
        not vary.
    """
    check.one_of("script", script, SCRIPTS)
    its = SCRIPTS[script]
    check.one_of(f"network of {script}", network, its.searches)
    for name in varied:
        check.one_of(f"option of {script}", name, [*its.varied, *OWN])
    begins = its.images
    if data.served(DATASET, source) == "bundled":
        begins = range(0, data.size(DATASET, "bundled"), its.num_images)
    values = [_several(varied.get(name, released)) for name, released in its.varied.items()]
    made = []
    for combination in itertools.product(*values):
        first = its.trial(network, iterations, **dict(zip(its.varied, combination)))
        kept = {"keep_every": apart} if (apart := keep_every or its.keep_every) else {}
        first = replace(first, source=source, attack_options=Options(first.attack_options, **kept))
        made += [
            replace(first, index=begins[i % len(begins)], seed=i) for i in range(n or its.repeats)
        ]
    return made


def _several(given: Any) -> tuple[Any, ...]:
    several = not isinstance(given, str) and hasattr(given, "__iter__")
    return tuple(given) if several else (given,)


@check.arguments
def script_of(trial: Trial) -> str | None:
    """Key of the script that runs this trial, whatever image, seed and number of iterations; None
    where there is none.
    """
    found = _known().get(_plainly(trial))
    return None if found is None else found[0]


@check.arguments
def search(trial: Trial) -> str:
    """How a trial searches, for a column of a table.

    Returns
    -------
    str
        "as released" for a trial of a released script with one of its values; "its authors'" for
        IG as its authors run it; ", shortened" follows either where it has another number of
        iterations. "released search" for the released optimizers over a whole budget where label,
        client or values are others; "signed Adam" for IG's in another setting; "our search";
        "none" of an attack that does not search.
    """
    if "max_evaluations" not in records.ATTACKS[trial.attack].options:
        return "none"
    found = _known().get(_plainly(trial))
    if found is not None:
        script, budget = found
        name = AUTHORS if script == AUTHORS_IG else AS_RELEASED
        return name if _budget(trial) == budget else f"{name}, {SHORTENED}"
    its_own = "signed_adam" if trial.attack == "inverting_gradients" else "lbfgs"
    optimizer = trial.attack_options.get("optimizer", its_own)
    if optimizer == "signed_adam":
        return "signed Adam"
    released = {each.optimizer for script in SCRIPTS.values() for each in script.searches.values()}
    whole = trial.attack_options.get("whole_budget", False)
    return ALIKE if whole and optimizer in released else "our search"


def _budget(trial: Trial) -> tuple[Any, ...]:
    return tuple(trial.attack_options.get(name) for name in ("max_iterations", "max_evaluations"))


def _plainly(trial: Trial) -> Trial:
    """The trial without what does not make it another experiment."""
    free = ("max_iterations", "max_evaluations", "keep_every")
    options = Options({n: v for n, v in trial.attack_options.items() if n not in free})
    return replace(trial, attack_options=options, index=0, seed=0, source="bundled")


@functools.cache
def _known() -> dict[Trial, tuple[str, tuple[Any, ...]]]:
    """{each released trial, plainly: its script and its budget}."""
    return {
        _plainly(trial): (name, _budget(trial))
        for name, script in SCRIPTS.items()
        for network in script.searches
        for trial in trials(name, network=network, n=1, source="bundled")
    }
