"""How much an update tells of the client's images: any network, any optimizer, before any attack.

Near the client's images x the update is linear in them, and known up to noise of variance σ²:

    Δ(x + ẋ) = Δ(x) + J ẋ + noise,    N = Jᵀ diag(1/σ²) J,

N the Fisher information. A direction v of the images is fixed to a standard deviation of 1/√(vᵀN v)
by the update alone. Together with a normal prior of covariance L Lᵀ the images have the covariance

    S = L (1 + LᵀN L)⁻¹ Lᵀ,

and no estimate has a smaller mean square error than its trace, as far as the update is linear
within the prior. Where the images are fixed well, S is the Cramér-Rao bound N⁻¹, and the prior does
not matter. Where they are not, the prior decides: a better one, such as of faces, allows more.

Its public name is ``information``. It is computed at known images: by their owner, for an audit of
his own, or at a reconstruction. Granted to the observer are labels, optimizer, learning rate and
W_t, chance in the network, and the factor of a clipped update. Not counted are batch norm's running
statistics, which tell more where they are sent.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from torch import nn

from dlm_core import check, federated
from dlm_core.arrays import Images, Labels, Precision, for_model
from dlm_core.beyond import clients, priors
from dlm_core.beyond.jacobian import Client, Jacobian, slope_along
from dlm_core.beyond.lanczos import lanczos
from dlm_core.beyond.precision import Precision as Known
from dlm_core.beyond.precision import precision
from dlm_core.defenses import Setting
from dlm_core.observation import Observation, observe, scores
from dlm_core.threads import own_generator
from dlm_core.weights import rounded

Prior = Literal["white", "smooth"]

PRIOR_PSNR = -20 * math.log10(priors.STD)  # in dB, what a prior allows without an update
AbovePrior = Annotated[
    float,
    check.Must(
        f"above the {PRIOR_PSNR:.2f} dB that the prior allows without an update",
        lambda psnr: PRIOR_PSNR < psnr < math.inf,
    ),
]
HALF_GREY = 0.5 / 255  # half a grey level of 8-bit images
# Numbers of a matrix up to which it is formed: in float64 (0.8 GB), else in float32 (1.1 GB). To
# float32 its singular values are as true as the eigenvalues of its square would be in float64.
LARGEST_DOUBLE, LARGEST_FLOAT = 100_000_000, 280_000_000
LARGEST_SQUARE = 6_200  # pixels: two images of 32x32 in colour
ROWS = 6_000  # of the matrix that are reduced at once
PROBES, STEPS = 4, 200  # of Lanczos, where it is not formed
ROUNDED = 1e-13  # of the largest eigenvalue: the rounding of a metric's


@dataclass(frozen=True)
class Posterior:
    """What is known of the images once the update is seen, with one prior.

    Attributes
    ----------
    prior
        Its name.
    variance
        [N, C, H, W] of each pixel.
    shares
        [k] what is left of the prior's variance along each direction, from 0, known, to 1.
    counts
        [k] how many directions each stands for; 1 where they were all computed.
    known
        {layer: how many directions its weights account for}. The sum over layers is that of what
        is no longer open, Σ (1 - share).
    """

    prior: str
    variance: torch.Tensor = field(repr=False)
    shares: torch.Tensor = field(repr=False)
    counts: torch.Tensor = field(repr=False)
    known: Mapping[str, float]

    @property
    def psnr(self) -> float:
        """In dB for data of range 1: what the mean over pixels of the variance allows."""
        return -10 * math.log10(float(self.variance.mean()))

    def below(self, share: float) -> int:
        """How many directions have less than this share of the prior's variance left."""
        return round(float(self.counts[self.shares <= share].sum()))


class Information:
    """What an update tells of the images.

    Its numbers are computed when they are first asked for, and kept.

    Attributes
    ----------
    image_shape
        (N, C, H, W).
    entries
        How many entries of the update are above their noise.
    prior
        The one that ``bound_psnr``, ``exposed`` and ``layers`` take.
    estimated
        Whether the matrix was too large to be formed: numbers of directions are then estimates, to
        a few per cent, and ``exposed`` is the mean of a few random draws.
    """

    def __init__(self, measured: "_Measured", entries: int, prior: Prior) -> None:
        self.image_shape = tuple(measured.jacobian.images.shape)
        self.entries, self.prior = entries, prior
        self._measured = measured
        self._posteriors: dict[str, Posterior] = {}
        self.estimated = not measured.can_be_formed

    def __repr__(self) -> str:
        return f"Information({self.summary})"

    @property
    def size(self) -> int:
        """All directions: the pixels of all images."""
        return math.prod(self.image_shape)

    @check.arguments
    def directions(self, std: check.Positive = HALF_GREY) -> int:
        """How many directions of the images the update alone fixes to this standard deviation.

        Parameters
        ----------
        std
            Of an image in [0, 1]; half a grey level by default.
        """
        return self.posterior("white").below(1 / (1 + (priors.STD / std) ** 2))

    @property
    def better_than_prior(self) -> int:
        """How many directions the update tells more of than the prior does."""
        return self.posterior(self.prior).below(0.5)

    @property
    def bound_psnr(self) -> float:
        """PSNR in dB (data range 1) that the update and the prior allow."""
        return self.posterior(self.prior).psnr

    @property
    def exposed(self) -> torch.Tensor:
        """[N, C, H, W] standard deviation of each pixel once the update is seen: 0 is exposed, the
        prior's is hidden.
        """
        return self.posterior(self.prior).variance.sqrt()

    @check.arguments
    def map(self, prior: Prior = "smooth") -> torch.Tensor:
        """[N, 1, H, W] from 0, where a pixel is as unknown as before, to 1, where it is exposed.

        Parameters
        ----------
        prior
            "white" or "smooth".
        """
        variance = self.posterior(prior).variance
        before = priors.variance(prior, variance.shape[1:]).to(variance).mean(0)
        return 1 - (variance.mean(1, keepdim=True) / before).sqrt().clamp(0, 1)

    @property
    def layers(self) -> dict[str, float]:
        """{layer: how many directions its weights account for}, of those that are known at all."""
        return dict(self.posterior(self.prior).known)

    @property
    def summary(self) -> str:
        """In a sentence."""
        about = "about " * self.estimated
        return (
            f"the update fixes {about}{self.directions()} of {self.size} directions to half a grey "
            f"level and {about}{self.directions(0.05)} to 0.05, "
            f"and tells more than a {self.prior} prior of {about}{self.better_than_prior}; "
            f"with that prior {self.bound_psnr:.1f} dB are possible"
        )

    @check.arguments
    def posterior(self, prior: Prior) -> Posterior:
        """What is known with the prior of that name, "white" or "smooth"."""
        if prior not in self._posteriors:
            self._posteriors[prior] = self._measured.posterior(prior)
        return self._posteriors[prior]


@check.arguments
def of_update(
    model: nn.Module,
    images: Images,
    labels: Labels,
    *,
    learning_rate: check.Positive,
    local_steps: check.Count = 1,
    batch_size: check.Count | None = None,
    client_optimizer: str = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
    transmitted: Precision | None = None,
    defence: Setting | Mapping[str, Any] | None = None,
    loss: Callable[..., torch.Tensor] = federated.loss,
    prior: Prior = "white",
    seed: check.Whole = 0,
) -> Information:
    """Return what a client's update tells of its images, at these images.

    Parameters
    ----------
    model
        The network as the client receives it, in the mode that it trains in. It is left as it was.
    images
        [N, C, H, W] in [0, 1], what the client has, or a reconstruction of it.
    labels
        [N] class indices.
    learning_rate
        η > 0.
    local_steps, batch_size, optimizer_options, transmitted
        As in ``federated.train_locally``.
    client_optimizer
        Key of ``records.CLIENT_OPTIMIZERS``, one with a ``step``.
    defence
        A ``defenses.Setting``, or a dict of its "name" and, beside it, "observer" and the defence's
        own options; None for none.
    loss
        (class scores, labels) -> scalar.
    prior
        "white": pixels independent, of standard deviation 0.25. "smooth": of the same variance, and
        the spectrum of natural images, which allows an observer more. ``Information.map`` and
        ``noise_for`` take "smooth" unless told.
    seed
        Of a defence's noise, and of the estimates where the matrix is too large to be formed.

    Raises
    ------
    ValueError
        For arguments out of range, for images and labels that do not fit the model, and for a
        defence that adds noise to a client of another optimizer than SGD.
    FloatingPointError
        Where the client's training diverges.

    Notes
    -----
    It takes n products with the Jacobian, n the pixels of all images, and memory for n times the
    entries of the update: seconds for LeNet and one image. A linear layer's part is reduced to its
    inputs and signals. Where that is too large for memory, Lanczos estimates the numbers.

    The network of beginners' tutorials (two convolutions with ReLU and max-pooling, three linear
    layers, PyTorch's initial weights), the first bundled image of CIFAR-100, one step of 0.01: of
    3,072 directions 943 are fixed to half a grey level and 952 to 0.05, all of those that are
    better known than by a white prior; 13.7 dB are possible with that, 18.8 dB with a smooth one.

    Examples
    --------
    >>> from dlm_core import data, information, models
    >>> images, labels, *_ = data.load("digits", n=1)
    >>> model = models.build("mlp", (1, 8, 8), 10, seed=0)
    >>> information.of_update(model, images, labels, learning_rate=0.01).directions(0.05)
    64
    """
    setting = None if defence is None else Setting.of(defence)
    model = copy.deepcopy(model)
    if transmitted is not None:
        model.load_state_dict(rounded(model.state_dict(), transmitted))
    steps = (learning_rate, local_steps, batch_size)
    jacobian = _jacobian(model, images, labels, client_optimizer, optimizer_options, loss, steps)
    seen = _defended(model, jacobian, setting, seed)
    if seen is not None and any(seen[0].noise_variance(seen[1])):
        _check_follows(client_optimizer)
    client, x = jacobian.client, jacobian.images
    known = precision(model, client, x, jacobian.update, transmitted, seen)
    entries = sum(int((each > 0).sum()) for each in known.of_entries.values())
    return Information(_Measured(jacobian, known, seed), entries, prior)


@check.arguments
def noise_for(
    model: nn.Module,
    images: Images,
    labels: Labels,
    *,
    learning_rate: check.Positive,
    psnr: AbovePrior = 20.0,
    prior: Prior = "smooth",
    clip: check.Positive | None = None,
    local_steps: check.Count = 1,
    batch_size: check.Count | None = None,
    client_optimizer: str = "sgd",
    optimizer_options: Mapping[str, Any] | None = None,
    loss: Callable[..., torch.Tensor] = federated.loss,
) -> float:
    """Return the noise on an update at which no observer with that prior passes ``psnr`` dB in the
    mean.

    Parameters
    ----------
    model, images, labels, learning_rate
        As in ``of_update``.
    psnr
        In dB, above what the prior alone allows (12.04).
    prior
        As in ``of_update``. An observer who knows more of the images passes it.
    clip
        Length to which the update is shortened before noise is added; None for no clipping.
    local_steps, batch_size, client_optimizer, optimizer_options, loss
        As in ``of_update``.

    Returns
    -------
    float
        Standard deviation of normal noise that is added to each entry: of ``clip_and_noise`` its
        multiplier times ``clip``. 0 where the update tells less without noise.

    Raises
    ------
    ValueError
        As ``of_update`` does, for another optimizer than SGD, for a psnr that no noise reaches, and
        for images and networks that are too large for the matrix.
    FloatingPointError
        Where the client's training diverges.

    Notes
    -----
    Rounding of the weights is left out: where it counts beside the noise, less of that is enough.
    """
    _check_follows(client_optimizer)
    steps = (learning_rate, local_steps, batch_size)
    jacobian = _jacobian(
        copy.deepcopy(model), images, labels, client_optimizer, optimizer_options, loss, steps
    )
    ones = {name: torch.ones_like(delta) for name, delta in jacobian.update.items()}
    measured = _Measured(jacobian, Known(ones), seed=0)
    if not measured.can_be_formed:
        raise ValueError(
            f"images have {jacobian.size:,} pixels and the update {jacobian.height:,} entries; "
            f"their matrix is too large to be formed"
        )
    length = float(torch.stack([d.norm() for d in jacobian.update.values()]).norm())
    factor = 1.0 if clip is None else min(1.0, clip / length)
    values, sizes = measured.spectrum(prior)

    def left(noise: float) -> float:
        """The mean variance of a pixel."""
        return float((sizes / (1 + values * (factor / noise) ** 2)).sum()) / jacobian.size

    allowed = 10 ** (-psnr / 10)
    low, high = (math.log(scale * factor * float(values.max().sqrt())) for scale in (1e-12, 1e6))
    if left(math.exp(low)) >= allowed:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if left(math.exp(middle)) < allowed else (low, middle)
    return math.exp(high)


def _check_follows(client_optimizer: str) -> None:
    """Under noise the update must be linear in the gradient over more than rounding. A step of
    Adam's kin is not: it turns within its eps, where the gradient of a black pixel is.
    """
    if clients.step_of("client_optimizer", client_optimizer) is not clients.sgd:
        raise ValueError(
            f"client_optimizer is {client_optimizer!r}; under noise the bound takes sgd alone"
        )


def _jacobian(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizer: str,
    options: Mapping[str, Any] | None,
    loss: Callable[..., torch.Tensor],
    steps: tuple[float, int, int | None],
) -> Jacobian:
    """The Jacobian of a client's update; ``steps``: learning rate, local steps, batch size."""
    step = clients.step_of("client_optimizer", optimizer)
    options = options or {}
    clients.check_options("optimizer_options", step, options)
    if len(labels) != len(images):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; it takes {len(images)} class indices, "
            "one for each of the images"
        )
    x = for_model(images, model).detach().double()
    client = Client(model, labels.to(x.device), loss, step, options, *steps)
    jacobian = _fitting(client, x)
    if not all(d.isfinite().all() for d in jacobian.update.values()):
        raise FloatingPointError("the client's training diverged; lower learning_rate")
    return jacobian


def _fitting(client: Client, images: torch.Tensor) -> Jacobian:
    """The Jacobian, once images and labels are found to fit the model."""
    if not client.weights:
        raise ValueError("model has nothing to train: all its parameters are frozen")
    try:
        with torch.no_grad(), own_generator(seed=0, device=images.device):
            given = scores(copy.deepcopy(client.model).double()(images))
    except Exception as error:  # whatever a user's network raises
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"images has shape {tuple(images.shape)}; the model does not take them ({said})"
        ) from None
    if given.ndim == 2 and client.labels.max() >= given.shape[1]:
        raise ValueError(
            f"labels run up to {int(client.labels.max())}; "
            f"the model has classes 0 to {given.shape[1] - 1}"
        )
    return Jacobian(client, images)


def _defended(
    model: nn.Module, jacobian: Jacobian, setting: Setting | None, seed: int
) -> tuple[Setting, Observation] | None:
    """The defence, and what is seen under it."""
    if setting is None:
        return None
    before = model.state_dict()
    moved = {n: (before[n].double() - d).to(before[n].dtype) for n, d in jacobian.update.items()}
    shape = tuple(jacobian.images.shape[1:])
    return setting, setting.defend(observe(model, before, {**before, **moved}, shape), seed)


class _Measured:
    """The Jacobian in units of the noise: A, with N = AᵀA.

    Parameters
    ----------
    jacobian
        The Jacobian.
    known
        How precisely the update is seen.
    seed
        Of the estimates.
    """

    def __init__(self, jacobian: Jacobian, known: Known, seed: int) -> None:
        self.jacobian, self.seed = jacobian, seed
        # of each part, [k] factors or a matrix [k, k] that turns it into so many independent rows
        self.roots = [
            _root_of_factors(jacobian, n, known)
            if n in jacobian.taps
            else known.of_entries[n].flatten()
            for n in jacobian.lengths
        ]
        self.layers = [
            name if name in jacobian.taps else name.rpartition(".")[0] for name in jacobian.lengths
        ]

    @property
    def can_be_formed(self) -> bool:
        """Whether memory is enough for A and for square matrices of the images' size."""
        n = self.jacobian.size
        return n <= LARGEST_SQUARE and n * self.jacobian.height <= LARGEST_FLOAT

    def posterior(self, prior: Prior) -> Posterior:
        """What is known with the prior of that name."""
        to_images, to_coefficients = priors.root(prior, self.jacobian.images.shape[1:])
        maps = _on_rows(to_images, self.jacobian), _on_rows(to_coefficients, self.jacobian)
        found = self._formed if self.can_be_formed else self._estimated
        return found(prior, *maps)

    def spectrum(self, prior: Prior) -> tuple[torch.Tensor, torch.Tensor]:
        """([n] eigenvalues of LᵀNL, [n] sums of squares of the images that L makes of its
        eigenvectors).
        """
        to_images, to_coefficients = (
            _on_rows(each, self.jacobian)
            for each in priors.root(prior, self.jacobian.images.shape[1:])
        )
        _, values, vectors = torch.linalg.svd(to_coefficients(self._triangle))
        n = self.jacobian.size
        every = torch.cat([values.square(), values.new_zeros(n - len(values))])
        return every, to_images(vectors).square().sum(1)

    def _formed(
        self, prior: Prior, to_images: priors.Map, to_coefficients: priors.Map
    ) -> Posterior:
        """By the triangle R of A L and 1, RᵀR = 1 + LᵀNL; N would lose half of the digits."""
        n = self.jacobian.size
        one = torch.eye(n).to(self.jacobian.images)
        triangle = to_coefficients(self._triangle)
        both = torch.linalg.qr(torch.cat([triangle, one]), mode="r").R
        inverse = torch.linalg.solve_triangular(both, one, upper=True)  # its square is (1 + LᵀNL)⁻¹
        shares = torch.linalg.eigvalsh(inverse @ inverse.T).clamp(0, 1)
        spread = to_images(inverse.T)  # [n, n], its rows' squares sum up to S
        known = dict.fromkeys(self.layers, 0.0)
        for layer, rows in self._rows():
            known[layer] += float((rows @ spread.T).square().sum())
        variance = spread.square().sum(0).reshape(self.jacobian.images.shape)
        return Posterior(prior, variance, shares, torch.ones_like(shares), known)

    def _estimated(
        self, prior: Prior, to_images: priors.Map, to_coefficients: priors.Map
    ) -> Posterior:
        """By Lanczos; S^½ times white noise is a draw of what is left open."""

        def information(z: torch.Tensor) -> torch.Tensor:
            """LᵀNL z."""
            moved = self._times_roots(_joined(self.jacobian.forward(to_images(z))))
            back = self._times_roots(moved, transposed=True)
            return to_coefficients(_joined(self.jacobian.back(back)))

        n, like = self.jacobian.size, self.jacobian.images
        found = lanczos(
            information, n, starts=PROBES, steps=min(n, STEPS), seed=self.seed, like=like
        )
        drawn = to_images(found.apply(lambda values: (1 + values).rsqrt()))
        moved = self._times_roots(_joined(self.jacobian.forward(drawn)))
        known = dict.fromkeys(self.layers, 0.0)
        parts = moved.split([*self.jacobian.lengths.values()], dim=1)
        for layer, part in zip(self.layers, parts):
            known[layer] += float(part.square().sum(1).mean())
        variance = drawn.square().mean(0).reshape(like.shape)
        shares = 1 / (1 + found.values)
        return Posterior(prior, variance, shares.flatten(), found.counts.flatten(), known)

    @cached_property
    def _matrix(self) -> torch.Tensor:
        """Aᵀ [n, m], by as few products as there are: forward, or back."""
        n, m = self.jacobian.size, self.jacobian.height
        like = self.jacobian.images
        if m < n:
            entries = self._times_roots(torch.eye(m).to(like), transposed=True)
            return _joined(self.jacobian.back(entries)).T
        dtype = like.dtype if n * m <= LARGEST_DOUBLE else torch.float32
        matrix = torch.empty(n, m, dtype=dtype, device=like.device)
        done = 0
        for moved in self.jacobian.forward(torch.eye(n).to(like)):
            matrix[done : done + len(moved)] = self._times_roots(moved)
            done += len(moved)
        return matrix

    def _rows(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(layer, some rows [r, n] of A) in float64."""
        parts = self._matrix.split([*self.jacobian.lengths.values()], dim=1)
        for layer, part in zip(self.layers, parts):
            for some in part.split(ROWS, dim=1):
                yield layer, some.T.double()

    @cached_property
    def _triangle(self) -> torch.Tensor:
        """R [up to n, n] with RᵀR = AᵀA."""
        triangle = self.jacobian.images.new_zeros(0, self.jacobian.size)
        for some in self._matrix.split(ROWS, dim=1):
            triangle = torch.linalg.qr(torch.cat([triangle, some.T.double()]), mode="r").R
        return triangle

    def _times_roots(self, moved: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """[k, m] times what makes A of the Jacobian, part by part."""
        parts = moved.split([*self.jacobian.lengths.values()], dim=1)
        return torch.cat(
            [_times(each, root, transposed) for each, root in zip(parts, self.roots)], 1
        )


def _times(moved: torch.Tensor, root: torch.Tensor, transposed: bool) -> torch.Tensor:
    if root.ndim == 1:
        return moved * root
    return moved @ (root.T if transposed else root)


def _joined(chunks: Iterator[torch.Tensor]) -> torch.Tensor:
    return torch.cat([*chunks])


def _on_rows(of_images: priors.Map, jacobian: Jacobian) -> priors.Map:
    """A map of images as one of rows [k, n]."""
    shape = jacobian.images.shape
    return lambda rows: of_images(rows.reshape(-1, *shape)).reshape(len(rows), -1)


def _root_of_factors(jacobian: Jacobian, name: str, known: Known) -> torch.Tensor:
    """[k, k] Q with Q Qᵀ the information in the factors (δ, u) of a layer's gradient.

    Entry (o, i) of the gradient moves by Σ_r (δ̇_ro u_ri + δ_ro u̇_ri), and is known with the
    inverse variance w_oi. Errors of the client in δ move it alike: unknowns, that are eliminated.
    """
    tap, (delta, u) = jacobian.taps[name], jacobian.factors[name]
    w = {
        kind: (known.of_entries[full] * _slope(jacobian, full, _gradient(kind, delta, u))).square()
        for kind, full in tap.parameters.items()
    }
    rows, outputs = delta.shape
    of_delta = torch.einsum("oi,ri,si->ors", w["weight"], u, u)
    if "bias" in w:
        of_delta = of_delta + w["bias"][:, None, None]
    of_u = torch.einsum("oi,ro,so->irs", w["weight"], delta, delta)
    both = torch.einsum("oi,ri,so->rosi", w["weight"], u, delta).reshape(rows * outputs, -1)
    metric = torch.cat(
        [
            torch.cat([_interleaved(of_delta), both], 1),
            torch.cat([both.T, _interleaved(of_u)], 1),
        ]
    )
    if name in known.of_signals:
        count = rows * outputs
        own = metric[:count, :count] + torch.eye(count).to(metric) / known.of_signals[name]
        metric = metric - metric[:, :count] @ torch.linalg.solve(own, metric[:count])
    size = metric.diagonal().clamp(min=0).sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    values, vectors = torch.linalg.eigh(scale[:, None] * metric * scale)
    # δ may grow and u shrink: what leaves the gradient as it is is not seen at all
    values = torch.where(values > ROUNDED * values[-1], values, 0.0)
    return size[:, None] * vectors * values.sqrt()


def _interleaved(blocks: torch.Tensor) -> torch.Tensor:
    """[k, r, r] blocks, one an entry of a row -> [r·k, r·k] over rows, then entries."""
    k, r, _ = blocks.shape
    return torch.einsum("krs,kl->rksl", blocks, torch.eye(k).to(blocks)).reshape(r * k, r * k)


def _gradient(kind: str, delta: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return delta.T @ u if kind == "weight" else delta.sum(0)


def _slope(jacobian: Jacobian, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """By how much each entry of Δ moves with its gradient, in one step of the optimizer."""
    client = jacobian.client
    weight = client.weights[name]
    one = torch.ones_like(gradient)
    return slope_along(lambda g: weight - client.stepped(weight, g, None)[0], gradient, one)
