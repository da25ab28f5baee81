"""What the update of a trial's client tells, whatever attacks it: values that ``sweeps.sweep``
runs, and keeps.

The truth enters here, as in ``judge``: no attack is told any of it.
"""

import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from dlm_core import check, records
from dlm_core.beyond import fisher
from dlm_core.beyond.fisher import Prior
from dlm_core.harness import scene
from dlm_core.harness.keys import result_key
from dlm_core.records import Options
from dlm_core.threads import client_seed, one_thread, own_generator

# Known by an attribute: its module imports all attacks, on which no bound depends.
Trial = Annotated[Any, check.Must("a trials.Trial", lambda x: hasattr(x, "attack_options"))]
FIXED = 0.05  # standard deviation up to which a direction counts as fixed, beside half a grey level


@dataclass(frozen=True)
class Bound:
    """What a client's update tells of its images.

    Attributes
    ----------
    trial
        Whose client and defence it is. Its attack does not matter: trials of one client have one
        bound.

    Raises
    ------
    ValueError
        For a trial of another protocol than FedAvg, or whose gradients are not cleared.
    """

    trial: Trial

    def __post_init__(self) -> None:
        check.fields(self)
        _check(self.trial)
        object.__setattr__(self, "trial", _client_of(self.trial))

    @property
    def key(self) -> str:
        """The name of the result."""
        return _key(self)

    def run(self) -> dict[str, Any]:
        """The record: directions of "size" that are fixed ("fixed" to 0.05, "half_grey" to half a
        grey level), the bounds "white" and "smooth" in dB, "layers" by name; under "arrays" the
        truth and the map of what is exposed.
        """
        trial, began = self.trial, time.process_time()
        with one_thread(), own_generator(trial.seed):
            found = fisher.of_update(
                **_given(trial), **_sent(trial), seed=client_seed(trial.seed, 0, 0)
            )
            white, smooth = found.posterior("white"), found.posterior("smooth")
            kept = {"truth": scene.truth_of(trial, trial.num_images)[0], "map": found.map()}
            return {
                "size": found.size,
                "fixed": found.directions(FIXED),
                "half_grey": found.directions(),
                "better_than_prior": found.better_than_prior,
                "white": white.psnr,
                "smooth": smooth.psnr,
                "estimated": found.estimated,
                "layers": dict(white.known),
                "seconds": time.process_time() - began,
                "arrays": {name: each.float().contiguous() for name, each in kept.items()},
            }


@dataclass(frozen=True)
class Noise:
    """The noise on a client's update at which no observer with a prior passes ``psnr`` in the mean.

    Attributes
    ----------
    trial
        As in ``Bound``; its defence does not matter.
    psnr, prior
        As in ``information.noise_for``.
    """

    trial: Trial
    psnr: fisher.AbovePrior = 20.0
    prior: Prior = "smooth"

    def __post_init__(self) -> None:
        check.fields(self)
        _check(self.trial)
        object.__setattr__(self, "trial", replace(_client_of(self.trial), defence=None))

    @property
    def key(self) -> str:
        """The name of the result."""
        return _key(self)

    def run(self) -> dict[str, Any]:
        """The record: "noise", the standard deviation, and "length", the update's."""
        with one_thread(), own_generator(self.trial.seed):
            seen, *_ = scene.observe(self.trial)
            length = torch.stack([each.norm() for each in seen.delta]).norm()
            noise = fisher.noise_for(**_given(self.trial), psnr=self.psnr, prior=self.prior)
            return {"noise": noise, "length": float(length), "arrays": {}}


def _check(trial: Trial) -> None:
    if trial.protocol is not None:
        raise ValueError(f"trial has the protocol {trial.protocol.name!r}; it takes FedAvg's alone")
    if not trial.client.clear_gradients:
        raise ValueError("trial: clear_gradients is False; it takes clients that clear them")


def _client_of(trial: Trial) -> Trial:
    return replace(trial, attack="grey", attack_options=Options())


def _key(value: Bound | Noise) -> str:
    trial = value.trial
    named = [each for each in trial.named if each is not records.ATTACKS[trial.attack]]
    return result_key(value, [__name__], named, trial.dataset, trial.source)


def _given(trial: Trial) -> dict[str, Any]:
    """The client and its training, as ``information`` takes them."""
    images, labels = scene.truth_of(trial, trial.num_images)
    dtype = scene.DTYPES[trial.client.dtype]
    model = scene.received(trial).to(dtype)
    model.train(trial.client.mode == "train")
    told = scene.training(trial.client)
    told = {n: v for n, v in told.items() if n not in ("transmitted", "clear_gradients")}
    return {"model": model, "images": images.to(dtype), "labels": labels, **told}


def _sent(trial: Trial) -> dict[str, Any]:
    """What becomes of the update on its way."""
    transmitted = trial.client.transmitted
    sent = None if transmitted is None else scene.DTYPES[transmitted]
    return {"transmitted": sent, "defence": trial.defence}
