"""An attacker who has seen digits before: plug-and-play with a small denoiser.

The data term is the likelihood of all updates seen, under the defence's known noise. The prior is a
denoiser that was trained on digits which are not attacked. A denoiser D(x, σ) of white noise knows
the prior's score, (D(x, σ) - x)/σ², and that is all that a descent needs of a prior.

Sources: Venkatakrishnan, Bouman and Wohlberg 2013 (plug-and-play priors); Romano, Elad and Milanfar
2017 (regularisation by denoising, whose gradient is used here); Karras et al. 2022 (the denoiser's
scaling). The descent goes from strong noise to weak, as samplers of diffusion models do.
"""

import copy
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from dlm_core import check, data, records
from dlm_core.arrays import Labels
from dlm_core.defenses import Setting
from dlm_core.federated import loss as training_loss
from dlm_core.observation import Observation
from dlm_core.results import Reconstruction, SearchEvidence, Status
from dlm_core.threads import one_thread, own_generator

# The first 100 digits are left to those who attack: the denoiser never sees them.
PUBLIC = range(100, 1797)
SHAPE, CLASSES = (1, 8, 8), 10
WIDTH = 256  # units of the denoiser's two hidden layers
TRAINING_STEPS = 2000
WEAKEST, STRONGEST = 0.02, 2.0  # standard deviations of noise that it learns to remove
SEED = 0  # of its training: one denoiser for all trials

CANDIDATES = 3  # classes that are tried where the label is not told
# Of an update, the part that a simulated client may miss.
UNEXPLAINED = 0.01
# of the descent, chosen on digits 60 to 65, which no notebook attacks
STEPS = 80
FIRST_NOISE = 1.0  # the descent's σ at its start
MOST_NOISE = 0.3  # and the largest at its end, however little the updates say
FIRST_STEP, LAST_STEP = 0.1, 0.005  # Adam's, in pixels
PROBE = 0.05  # by which pixels are moved to see how much the updates say of them

Told = Setting | Mapping[str, Any]
Weights = dict[str, torch.Tensor]


class Denoiser(nn.Module):
    """D(x, σ, y): the mean of the digits of class y that x may be a noisy picture of.

    Attributes
    ----------
    mean
        The mean digit, [64].
    means
        That of each class, [10, 1, 8, 8].
    """

    mean: torch.Tensor
    means: torch.Tensor

    def __init__(self, mean: torch.Tensor, means: torch.Tensor, spread: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean.flatten())
        self.register_buffer("means", means)
        self.spread = spread
        pixels = mean.numel()
        self.net = nn.Sequential(
            nn.Linear(pixels + 1 + CLASSES, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, pixels),
        )

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The images without their noise.

        Parameters
        ----------
        x
            [N, 1, 8, 8].
        sigma
            Standard deviation of the noise in each, [N].
        labels
            Classes, [N].
        """
        noisy, sigma = x.flatten(1) - self.mean, sigma[:, None]
        length = (sigma.square() + self.spread**2).sqrt()
        known = [noisy / length, sigma.log() / 4, nn.functional.one_hot(labels, CLASSES)]
        guess = self.net(torch.cat([each.to(noisy) for each in known], 1))
        clean = (self.spread / length) ** 2 * noisy + sigma * self.spread / length * guess
        return (clean + self.mean).reshape(x.shape)


@functools.lru_cache(maxsize=2)
def denoiser(training_steps: int = TRAINING_STEPS) -> Denoiser:
    """The denoiser, trained on the digits of ``PUBLIC``: the same bits in every process of a
    machine. It takes about ten seconds, once a process.

    Parameters
    ----------
    training_steps
        Adam's, each on 256 noisy digits.
    """
    images, labels, *_ = data.load("digits", indices=PUBLIC, source="bundled")
    with one_thread(), own_generator(SEED):
        mean = images.mean(0)
        classes = [images[labels == k] for k in range(CLASSES)]
        means = torch.stack([each.mean(0) for each in classes])
        model = Denoiser(mean, means, float((images - mean).square().mean().sqrt()))
        adam = torch.optim.Adam(model.parameters(), lr=2e-3)
        slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, training_steps)
        for _ in range(training_steps):
            batch = torch.randint(len(labels), (256,))
            clean, classes_of = images[batch], labels[batch]
            sigma = WEAKEST * (STRONGEST / WEAKEST) ** torch.rand(len(batch))
            noisy = clean + sigma[:, None, None, None] * torch.randn_like(clean)
            errors = (model(noisy, sigma, classes_of) - clean).square().flatten(1).mean(1)
            # each strength counts alike: by the error that is left at best, about
            scale = sigma.square() * model.spread**2 / (sigma.square() + model.spread**2)
            adam.zero_grad()
            (errors / scale).mean().backward()
            adam.step()
            slower.step()
    return model.requires_grad_(False).eval()


@records.attack(
    "learned_prior",
    title="plug-and-play",
    colour=1,
    marker="d",
    assumes=(
        "that the client ran plain SGD",
        "that its images are 8x8 digits, of which it has seen others",
        "for batches the labels",
    ),
    client="plain SGD on 8x8 digits, in one round or in several, defended",
    example={"training_steps": 50},
)
@check.arguments
def plug_and_play(
    seen: Observation | Sequence[Observation],
    *,
    defence: Told,
    learning_rate: check.Positive,
    local_steps: check.Count = 1,
    num_images: check.Count = 1,
    labels: str | Labels = "inferred",
    seed: check.Whole = 0,
    max_evaluations: check.Count = STEPS,
    last_noise: check.Positive | None = None,
    training_steps: check.Count = TRAINING_STEPS,
) -> Reconstruction:
    """Descend on the likelihood of all updates and on a learned prior at once.

    Parameters
    ----------
    seen
        What the observer sees: one round, or several of a client with the same images.
    defence
        Told, with its strength.
    learning_rate, local_steps
        η > 0 and E >= 1, told: a server prescribes them.
    num_images
        B, the number of images in each of the client's steps.
    labels
        "inferred" for one image: the classes whose mean digit explains the updates best are tried,
        and the one whose picture does is kept. For several: class indices [B], told.
    seed
        Of the start.
    max_evaluations
        Steps of the descent.
    last_noise
        σ > 0 of the denoiser at the descent's end; it begins at 1. None takes what the updates
        leave uncertain in a pixel.
    training_steps
        Of ``denoiser``.

    Raises
    ------
    ValueError
        For images that are not 8x8 digits, for several without labels, and for a network with
        buffers, such as batch normalisation's.
    """
    began = time.perf_counter()
    rounds = [seen] if isinstance(seen, Observation) else list(seen)
    check.at_least("number of rounds", len(rounds), 1)
    _check_suits(rounds[0], num_images, labels)
    setting = Setting.of(defence)
    with one_thread():
        prior = copy.deepcopy(denoiser(training_steps)).to(rounds[0].delta[0].device)
        client = _Client.of(rounds, setting, learning_rate, local_steps)
        known = _candidates(client, prior, labels)
        last = last_noise or _uncertainty(client, prior.means[known], known)
        images, losses = _descend(client, prior, known, seed, max_evaluations, last)
        best = int(losses[-1].argmin())
    return Reconstruction(
        images=images[best].to(next(rounds[0].model.parameters()).dtype),
        labels=known[best],
        status=Status.WHOLE,
        vouched=torch.zeros(num_images, dtype=torch.bool, device=images.device),
        evidence=SearchEvidence(
            losses=[float(each[best]) for each in losses], loss=float(losses[-1][best])
        ),
        seconds=time.perf_counter() - began,
    )


def _check_suits(seen: Observation, num_images: int, labels: Any) -> None:
    if seen.image_shape != SHAPE or seen.num_classes != CLASSES:
        raise ValueError(
            f"image_shape is {seen.image_shape} with {seen.num_classes} classes; the learned prior "
            f"is one of digits: {SHAPE} with {CLASSES}"
        )
    if any(True for _ in seen.model.buffers()):
        raise ValueError("model has buffers, such as batch normalisation's; it takes one without")
    if isinstance(labels, str) and labels != "inferred":
        raise ValueError(f"labels is {labels!r}; it takes 'inferred' or class indices")
    if isinstance(labels, str) and num_images > 1:
        raise ValueError(
            f"labels is 'inferred' with num_images {num_images}; for several they are told"
        )
    if not isinstance(labels, str) and len(labels) != num_images:
        raise ValueError(f"labels has {len(labels)} entries; num_images is {num_images}")


@dataclass(frozen=True)
class _Client:
    """The client in all rounds as a function of its images, and what was seen of it.

    Attributes
    ----------
    model
        The architecture.
    weights
        W_t, one row a round.
    updates, precision
        Δ of each round, and 1/variance of its entries; 0 where the defence left nothing to see.
    """

    model: nn.Module
    weights: Weights
    updates: Weights
    precision: Weights
    learning_rate: float
    local_steps: int
    clip: float

    @classmethod
    def of(
        cls, rounds: Sequence[Observation], setting: Setting, learning_rate: float, steps: int
    ) -> "_Client":
        names = [n for n, p in rounds[0].model.named_parameters() if p.requires_grad]
        each = [dict(one.model.named_parameters()) for one in rounds]
        weights = {n: torch.stack([one[n].detach().float() for one in each]) for n in names}
        updates = {n: torch.stack([one.delta_by_name[n] for one in rounds]).float() for n in names}
        known = [dict(zip(one.parameter_names, _precision(one, setting))) for one in rounds]
        precision = {n: torch.stack([one[n] for one in known]).float() for n in names}
        clips = setting.name == "clip_and_noise"
        clip = setting.strength["clip"] if clips else math.inf
        model = copy.deepcopy(rounds[0].model).float().eval()
        return cls(model, weights, updates, precision, learning_rate, steps, clip)

    def misfits(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """-log likelihood of each candidate, [N]: images [N, B, 1, 8, 8], labels [N, B]."""
        return self.apart(self.sent(images, labels), self.updates) / 2

    def apart(self, one: Weights, other: Weights) -> torch.Tensor:
        """How far two answers of all rounds are apart, in squares of the noise, [N]."""
        parts = [self.precision[n] * (one[n] - other[n]).square() for n in one]
        return torch.stack([each.flatten(1).sum(1) for each in parts]).sum(0)

    def sent(self, images: torch.Tensor, labels: torch.Tensor) -> Weights:
        """What each candidate sends in each round, before noise: tensors [N, rounds, …]."""
        in_each_round = vmap(self._sent, in_dims=(0, None, None))
        return vmap(in_each_round, in_dims=(None, 0, 0))(self.weights, images, labels)

    def _sent(self, weights: Weights, images: torch.Tensor, labels: torch.Tensor) -> Weights:
        """The same in one round, of one candidate."""

        def of(now: Weights) -> torch.Tensor:
            return training_loss(functional_call(self.model, now, (images,)), labels)

        now = dict(weights)
        for _ in range(self.local_steps):
            slope = grad(of)(now)
            now = {n: w - self.learning_rate * slope[n] for n, w in now.items()}
        sent = {n: weights[n] - now[n] for n in now}
        if math.isinf(self.clip):
            return sent
        length = (sum(each.square().sum() for each in sent.values()) + 1e-20) ** 0.5
        factor = (self.clip / length).clamp(max=1.0)
        return {n: factor * each for n, each in sent.items()}


def _precision(seen: Observation, setting: Setting) -> list[torch.Tensor]:
    """1/variance of what is not the client's in each entry of Δ; 0 where Δ shows nothing."""
    kept = setting.kept(seen) or [torch.ones_like(d, dtype=torch.bool) for d in seen.delta]
    found = []
    for mask, delta, variance, rounding in zip(
        kept, seen.delta, setting.noise_variance(seen), seen.rounding_variance
    ):
        shown = delta[mask]
        missed = UNEXPLAINED**2 * float(shown.square().mean()) if shown.numel() else 0.0
        found.append(mask / (variance + rounding + missed + 1e-20))
    return found


def _candidates(client: _Client, prior: Denoiser, labels: Any) -> torch.Tensor:
    """Labels to try, [N, B]: those told, or the classes whose mean digit explains most."""
    device = prior.mean.device
    if not isinstance(labels, str):
        return labels.to(device)[None]
    every = torch.arange(CLASSES, device=device)[:, None]
    misfits = client.misfits(prior.means[:, None], every)
    return every[misfits.argsort()[:CANDIDATES]]


def _uncertainty(client: _Client, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The standard error of a pixel that all updates together leave, at these images: by how far
    what is sent moves with them.
    """
    generator = torch.Generator().manual_seed(SEED)
    draw = torch.randn(images.shape, generator=generator).to(images)
    with torch.no_grad():
        moved = client.sent(images + PROBE * draw, labels)
        squares = client.apart(moved, client.sent(images, labels))
    told = float(squares.max()) / (PROBE**2 * images[0].numel())
    return min(max(told, 1e-12) ** -0.5, MOST_NOISE) if told < WEAKEST**-2 else WEAKEST


def _descend(
    client: _Client,
    prior: Denoiser,
    labels: torch.Tensor,
    seed: int,
    steps: int,
    last_noise: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(images [N, B, 1, 8, 8], the misfits [N] of every step)."""
    generator = torch.Generator().manual_seed(seed)
    start = prior.means[labels]
    draw = torch.randn(start.shape, generator=generator).to(start)
    images = (start + 0.1 * draw).requires_grad_()
    adam = torch.optim.Adam([images], lr=FIRST_STEP, betas=(0.8, 0.99))

    def denoised(sigma: float) -> torch.Tensor:
        flat = images.detach().flatten(0, 1)
        noise = torch.full((len(flat),), sigma, device=flat.device)
        return prior(flat, noise, labels.flatten()).reshape(images.shape)

    losses = []
    for step in range(steps):
        passed = step / max(1, steps - 1)
        sigma = FIRST_NOISE * (last_noise / FIRST_NOISE) ** passed
        adam.param_groups[0]["lr"] = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** passed
        misfits = client.misfits(images, labels)
        (slope,) = torch.autograd.grad(misfits.sum(), images)
        images.grad = slope + (images.detach() - denoised(sigma)) / sigma**2
        adam.step()
        losses.append(misfits.detach())
    with torch.no_grad():
        losses.append(client.misfits(images, labels))
    return denoised(last_noise).clamp(0, 1), losses
