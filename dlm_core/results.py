"""What every attack returns: one ``Reconstruction``, with its evidence and what it says about the
client.
"""

from dataclasses import dataclass, field, fields
from enum import IntEnum, StrEnum
from typing import Any

import torch


class Status(StrEnum):
    """How an attack, or a trial of one, ended; equal to the word that tables show."""

    CONVERGED = "converged"
    STALLED = "stalled"
    DIVERGED = "diverged"
    BUDGET = "budget"
    WHOLE = "whole budget"
    BASELINE = "baseline"
    CLIENT_DIVERGED = "client diverged"
    CLIENT_UNCHANGED = "client unchanged"
    SINGULAR = "attack singular"

    @property
    def sentence(self) -> str:
        """What it means, to be read after the numbers."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.CONVERGED: "as closely as the weights' rounding allows or was asked for",
    Status.STALLED: "it came to rest there, as most searches do",
    Status.BUDGET: "it was still falling at its last evaluation",
    Status.WHOLE: "it ran its whole budget, as the released code does, and this is its last point",
    Status.DIVERGED: "past its best point it diverged",
    Status.BASELINE: "nothing was attacked: a guess of an observer who looks at nothing",
    Status.CLIENT_DIVERGED: "the client's own training diverged, so there is nothing to attack",
    Status.CLIENT_UNCHANGED: "the client's weights did not change, so there is nothing to attack",
    Status.SINGULAR: "the attack's equations are singular: too little of the update was left",
}


@dataclass(frozen=True)
class ClientEstimate:
    """What an attack found out about the client beside its images; None where it cannot tell.

    Attributes
    ----------
    learning_rate
        η of one step, with its standard error where one is known.
    local_steps
        E.
    weight_decay
        λ.
    optimizer
        Key of ``records.CLIENT_OPTIMIZERS``.
    """

    learning_rate: float | None = None
    learning_rate_error: float | None = None
    local_steps: int | None = None
    weight_decay: float | None = None
    optimizer: str | None = None


class Explains(IntEnum):
    """How much of the update a result explains, by its own evidence."""

    LITTLE = 0
    PARTLY = 1
    FULLY = 2


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a reconstruction rests on. Each kind of attack has its own; all have a trace and can be
    put into words.

    Attributes
    ----------
    losses
        The objective at every evaluation (a fit: mean squared residual over noise at each step).
    loss
        That of the images returned: the lowest of them, where a search chose.
    """

    losses: list[float] = field(repr=False)
    loss: float

    @property
    def verdict(self) -> str | None:
        """A sentence that judges the result, derived from the fields; None for evidence that judges
        nothing.
        """
        return None

    @property
    def explains(self) -> Explains | None:
        """How much of the update the result explains; None where the evidence alone does not tell,
        as a search's.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class SearchEvidence(Evidence):
    """A search's trace. It vouches for nothing: a low loss proves no image.

    Attributes
    ----------
    k
        DLM's factor, about 1/η; None for attacks without one.
    ks
        Its value at every evaluation.
    history
        [(evaluation, images [B, C, H, W])] where intermediate images were asked for.
    point
        {name: tensor} of all that was optimised, in the search's own coordinates.
    tried
        [(E, lowest loss)] in the order of the searches, where the number of local steps was
        searched.
    """

    k: float | None = None
    ks: list[float] = field(repr=False, default_factory=list)
    history: list[tuple[int, torch.Tensor]] = field(repr=False, default_factory=list)
    point: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)
    tried: list[tuple[int, float]] = field(repr=False, default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What an attack found.

    Attributes
    ----------
    images
        [B, C, H, W] in the attacker's precision.
    labels
        [B] class indices: given, inferred, or the largest of the optimised logits; -1 where
        unknown.
    status
        How it ended.
    vouched
        [B] bool, whether the attack vouches for this image. A search never does.
    evidence
        What it rests on. Its fields can be read off the result as well: ``found.losses``,
        ``found.chi2``.
    client
        What it says about the client.
    seconds
        Wall time, all restarts together.
    """

    images: torch.Tensor = field(repr=False)
    labels: torch.Tensor
    status: Status
    vouched: torch.Tensor
    evidence: Evidence
    client: ClientEstimate = ClientEstimate()
    seconds: float = 0.0

    def __getattr__(self, name: str) -> Any:
        """The evidence's own fields, by their names."""
        if name.startswith("_") or name == "evidence":
            raise AttributeError(name)
        return getattr(self.evidence, name)

    @property
    def stop_reason(self) -> Status:
        """The former name of ``status``."""
        return self.status

    @property
    def evaluations(self) -> int:
        """The length of the trace: how often a search computed its objective (of an unrolled
        client, all its searches together), or the steps of a fit. Of restarts it counts the one
        that is returned.
        """
        return len(self.evidence.losses)

    @property
    def learning_rate(self) -> float | None:
        """η of the client, None where the attack does not tell. ``search.reconstruct`` tells none
        where it has not converged; an attack that simulates a client tells the η that it took.
        """
        return self.client.learning_rate

    @property
    def local_steps(self) -> int | None:
        """E of the client, None where the attack does not tell."""
        return self.client.local_steps

    @property
    def weight_decay(self) -> float | None:
        """λ of the client, None where the attack does not tell."""
        return self.client.weight_decay

    @property
    def learning_rate_error(self) -> float | None:
        """Standard error of η, None where the attack does not tell."""
        return self.client.learning_rate_error

    @property
    def k(self) -> float | None:
        """DLM's factor, or 1/η where η was found."""
        if isinstance(self.evidence, SearchEvidence) and self.evidence.k is not None:
            return self.evidence.k
        return 1 / self.client.learning_rate if self.client.learning_rate else None

    def numbers(self) -> dict[str, float | int | str]:
        """What a table shows of it: every number and word among its fields, those of its evidence
        and of the client.
        """
        found: dict[str, Any] = {"stop_reason": str(self.status), "seconds": self.seconds}
        for part in (self.evidence, self.client):
            found |= {each.name: getattr(part, each.name) for each in fields(part)}
        if self.evidence.verdict is not None:
            found["verdict"] = self.evidence.verdict
        plain = {n: v for n, v in found.items() if isinstance(v, (int, float, str))}
        return {n: str(v) if isinstance(v, str) else v for n, v in plain.items()}


def baseline(images: torch.Tensor) -> Reconstruction:
    """A guess of an observer who looks at nothing, as a Reconstruction: no label is known, nothing
    vouched for.
    """
    count, device = len(images), images.device
    return Reconstruction(
        images=images,
        labels=torch.full((count,), -1, device=device),
        status=Status.BASELINE,
        vouched=torch.zeros(count, dtype=torch.bool, device=device),
        evidence=SearchEvidence(losses=[], loss=float("nan")),
    )
