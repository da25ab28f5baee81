"""A network whose linear layers tell what passes through them: what of an image stands in their
input, and whether their update tells one input from several.
"""

import contextlib
import copy
import functools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from dlm_core.beyond import priors
from dlm_core.observation import TINY, scores
from dlm_core.threads import own_generator

NOISE = 3.0  # singular values up to so many times what rounding of the weights leaves are noise
NEAR = 1e-4  # how far inputs are moved, over their own size, to see how δ turns
NEAR32 = 1e-2  # the same in float32
TURNS = 1e-4  # the angle that δ turns by, over how far its input moved, from which two show as two
AWAY = 0.1  # how far inputs are moved to see whether rounding would hide that δ turns
DRAWN = 8  # images, as smooth as natural ones, whose inputs tell how far two of them are apart
HIDDEN = 40.0  # times the relative size below which rounding hides a direction: what δ turns by
PROBES = 4
ABSENT, ALIKE = 1e-3, 0.99  # of two inputs: what is taken for zero, and the cosine of the same
SAME = 0.02  # of two inputs, relative: what half precision leaves between them, and more
LEVELS = 4  # numbers of a δ to each size that it has, where a loss's slopes are constant
FITS = 0.999  # cosine of δ with the update's, from which a label is taken for the client's
FITS_EXACTLY = 1 - 5e-7  # the same where nothing else speaks of the loss: 0.1 % of δ's length


T = TypeVar("T")


class _Map(NamedTuple):
    """How a layer's input follows from the pixels.

    Attributes
    ----------
    position
        The pixel of each entry whose factor is not zero.
    factor, constant
        [features].
    """

    position: torch.Tensor
    factor: torch.Tensor
    constant: torch.Tensor


class Loss(NamedTuple):
    """What the last layer's move says of the client's loss.

    Attributes
    ----------
    seen
        Whether that layer moved.
    slopes
        [K] the loss's slopes in the scores, where they are the same for any images of a class.
    """

    seen: bool
    slopes: torch.Tensor | None = None


class Passed(NamedTuple):
    """What a pass leaves: inputs of layers [N, features] and scores [N, K]."""

    inputs: dict[str, torch.Tensor]
    scores: torch.Tensor


class Traced:
    """A copy of a network whose linear layers tell what passes through them: in float64, or in the
    network's own precision where it insists on that.

    Attributes
    ----------
    layers
        {name: layer}, those through which an image passes once, in that order.
    rows
        {name: inputs of it for one image}.
    fixed
        Names of those in front of which no parameter stands.
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        self.dtype = torch.float64
        self.shape = tuple(image_shape)
        self.device = next(self.model.parameters()).device
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.by_chance: set[str] = set()
        self.maps: dict[str, _Map | None] = {}
        named = self.model.named_modules()
        self.linear = {name: each for name, each in named if isinstance(each, nn.Linear)}
        self.returned: Any = None
        for name, module in self.linear.items():
            module.register_forward_pre_hook(
                lambda _, given, named, name=name: self._enters(
                    name, given[0] if given else named["input"]
                ),
                with_kwargs=True,
            )
        self.generator = torch.Generator().manual_seed(0)
        grey = self.grey()
        try:
            passed = self._pass(grey)
        except Exception:  # of a user's network that makes float32 of its own
            self.dtype = next(model.parameters()).dtype
            self.model.to(self.dtype)
            self.model.load_state_dict(model.state_dict())
            passed = self._pass(grey)
        self.near = NEAR if self.dtype == torch.float64 else NEAR32
        once = {n: each[0] for n, each in passed.items() if len(each) == 1}
        self.fixed: set[str] = set()
        shared = self._used_elsewhere(once) | self._used_elsewhere(once, train=True)
        once = {n: each for n, each in once.items() if n not in shared}
        self.layers = {name: self.linear[name] for name in once}
        self.rows = {name: each[..., 0].numel() for name, each in once.items()}

    def _enters(self, name: str, given: torch.Tensor) -> None:
        self.seen.setdefault(name, []).append(given.double())
        if not _same_state(self.began, self._chance()):
            self.by_chance.add(name)

    def _train(self, on: bool) -> None:
        """Gradients in all parameters, or in none; whole numbers have none."""
        for p in self.model.parameters():
            if p.is_floating_point():
                p.requires_grad_(on)

    def _chance(self) -> list[Any]:
        """Where the generators stand that networks draw from."""
        of_numpy: Any = numpy.random.get_state(legacy=False)
        states = [torch.get_rng_state(), random.getstate()[1], *of_numpy["state"].values()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def grey(self, count: int = 1) -> torch.Tensor:
        """[count, C, H, W], for where the images do not matter."""
        return torch.full((count, *self.shape), 0.5, dtype=torch.float64)

    @contextlib.contextmanager
    def instead(self, name: str, given: torch.Tensor) -> Iterator[None]:
        """A layer takes the inputs ``given`` [N, features] instead of what reaches it."""

        def taken(
            _: nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
        ) -> tuple[tuple[torch.Tensor], dict[str, torch.Tensor]]:
            shape = (args[0] if args else named["input"]).shape[1:]
            return (given.reshape(len(given), *shape).to(self.dtype),), {}

        hook = self.layers[name].register_forward_pre_hook(taken, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def holding(self, after: Mapping[str, torch.Tensor], share: float) -> Iterator[None]:
        """The network's weights are so far on their way to ``after``, as far as these go."""
        every = self.model.named_parameters()
        named = {n: w for n, w in every if n in after and w.is_floating_point()}
        kept = {name: w.clone() for name, w in named.items()}
        try:
            for name, w in named.items():
                w.lerp_(after[name].to(w), share)
            yield
        finally:
            for name, w in named.items():
                w.copy_(kept[name])

    def entering(self, module: nn.Module, image: torch.Tensor) -> torch.Tensor | None:
        """What enters a layer of ``model`` of one image; None where it is not called once, or the
        network fails.
        """
        given: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, args: given.append(args[0].double()))
        try:
            self._pass(image)
        except Exception:  # whatever a user's network raises
            return None
        finally:
            hook.remove()
        return given[0] if len(given) == 1 and len(given[0]) == 1 else None

    def passed_behind(
        self, name: str, given: torch.Tensor, *, train: bool = False, seed: int = 0
    ) -> Passed:
        """To what inputs [N, features] of a layer lead."""
        with self.instead(name, given):
            passed = self._pass(self.grey(len(given)), train=train, seed=seed)
        inputs = {each: x[0].flatten(1) for each, x in passed.items() if len(x) == 1}
        return Passed(inputs, scores(self.returned).double().flatten(1))

    def behind(self, name: str, values: torch.Tensor) -> set[str]:
        """Layers from this one on whose input does not hang on the image where this one's is
        given.
        """
        draw = torch.Generator().manual_seed(0)
        noise = torch.rand(1, *self.shape, generator=draw, dtype=torch.float64)
        with self.instead(name, values[None]):
            one, two = (self._pass(images) for images in (self.grey(), noise))
        order = list(self.layers)  # in front of it inputs may be the same for both images as well
        later = order[order.index(name) :]
        both = one.keys() & two.keys()
        return {each for each in later if each in both and torch.equal(one[each][0], two[each][0])}

    def _pass(
        self, images: torch.Tensor, *, train: bool = False, grad: bool = False, seed: int = 0
    ) -> dict[str, list[torch.Tensor]]:
        """{layer: what passed through it}, in eval mode, or in the one the client trains in."""
        self.model.train(train)
        self.seen, self.by_chance = {}, set()
        # batch norm's statistics move, of copies
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.set_grad_enabled(grad), own_generator(seed=seed, device=self.device):
            self.began = self._chance()
            given = images.to(self.device, self.dtype)
            self.returned = functional_call(self.model, buffers, (given,))
        return self.seen

    def _used_elsewhere(self, names: Iterable[str], *, train: bool = False) -> set[str]:
        """Layers whose weight or bias does more than the layer, or another thing in training: their
        gradient is not δ·[x; 1]ᵀ. No layer, where the network has no gradient.
        """
        layers = {name: self.linear[name] for name in names}
        for count in (1, 2):  # in training batch norm may need two
            try:
                found = self._differentiated(layers, count, train=train)
            except Exception:  # whatever a user's network raises
                continue
            return {name for name, each in found.items() if not self._of_a_layer(*each)}
        return set()

    def _differentiated(
        self, layers: Mapping[str, nn.Linear], count: int, *, train: bool
    ) -> dict[str, tuple[Any, ...]]:
        """{layer: (δ of its outputs, its inputs, gradient of its weight, of its bias)} of so many
        images and some loss; layers are left out that the loss does not hang on.
        """
        added: dict[str, torch.Tensor] = {}

        def probed(name: str, output: torch.Tensor) -> torch.Tensor:
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: probed(name, output))
            for name, layer in layers.items()
        ]
        parameters = [w for each in layers.values() for w in each.parameters(recurse=False)]
        noise = torch.rand(count, *self.shape, generator=self.generator, dtype=torch.float64)
        try:
            self._train(True)
            passed = self._pass(noise, train=train, grad=True)
            seen = {name: each[0] for name, each in passed.items()}
            self.fixed = {name for name, each in seen.items() if not each.requires_grad}
            total = torch.stack([(each * _slope(each)).sum() for each in _tensors(self.returned)])
            wanted = [*added.values(), *parameters]
            grads = torch.autograd.grad(total.sum(), wanted, allow_unused=True)
        finally:
            self._train(False)
            for hook in hooks:
                hook.remove()
        of = dict(zip(map(id, wanted), grads))
        return {
            name: (
                of[id(added[name])],
                seen[name].detach(),
                of.get(id(layer.weight)),
                of.get(id(layer.bias)),
            )
            for name, layer in layers.items()
            if name in added and of[id(added[name])] is not None  # training may skip it
        }

    def _of_a_layer(
        self,
        delta: torch.Tensor,
        x: torch.Tensor,
        of_weight: torch.Tensor | None,
        of_bias: torch.Tensor | None,
    ) -> bool:
        """Whether these are the gradients δ·xᵀ and δ, summed over rows, but for arithmetic: of what
        is summed, since in front of batch norm all of a bias's cancels.
        """
        delta, x = delta.double().flatten(0, -2), x.double().flatten(0, -2)
        summed = (
            (of_weight, delta.T @ x, delta.abs().T @ x.abs()),
            (of_bias, delta.sum(0), delta.abs().sum(0)),
        )
        return all(
            own is None or self.close(own.double(), expected, size)
            for own, expected, size in summed
        )

    def close(
        self, found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | None = None
    ) -> bool:
        """Whether two results are the same but for arithmetic, of numbers of that size, or of their
        own.
        """
        tolerance = 1e-6 if self.dtype == torch.float64 else 1e-3
        size = expected if size is None else size
        return bool((found - expected).abs().max() <= tolerance * size.abs().max())

    def is_pixels(self, name: str) -> bool:
        """Whether the layer's input is the image's pixels, each times a factor and plus a constant,
        in any order, and all of them.
        """
        return self.rows[name] == 1 and self._map(name) is not None

    def image_of(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """[1, C, H, W] from a layer's input where it ``is_pixels``."""
        found = self._map(name)
        assert found is not None
        position, factor, constant = found
        used = factor != 0
        pixels = (values - constant)[used] / factor[used]
        count = math.prod(self.shape)
        total = values.new_zeros(count).index_add(0, position, torch.ones_like(pixels))
        image = values.new_zeros(count).index_add(0, position, pixels) / total
        return image.reshape(1, *self.shape)

    def faint(self, name: str, direction: torch.Tensor) -> torch.Tensor | None:
        """[1, C, H, W] from the direction of a layer's input where it ``is_pixels``, scaled so that
        its largest number is 1; None where the network adds constants to the pixels in front.
        """
        found = self._map(name)
        if found is None or found.constant.any():
            return None
        image = self.image_of(name, direction)
        image = -image if image.sum() < 0 else image
        return image / image.max() if image.max() > 0 else None

    def contradicts(self, image: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether an image gives other inputs of later layers than these, which are known up to
        their length; where ReLU left nothing, and where chance reaches in training, they say
        nothing.
        """
        passes, sure = self._without_chance(image, inputs)
        return bool(sure) and not any(
            all(_alike(passed[name][0].flatten(), each) for name, each in sure.items())
            for passed in passes
        )

    def disagrees(
        self, image: torch.Tensor, inputs: Mapping[str, tuple[torch.Tensor, bool]]
    ) -> bool:
        """Whether later layers saw what another image leaves, by more than half precision explains;
        layers that chance reaches in training say nothing.

        Parameters
        ----------
        image
            [1, C, H, W].
        inputs
            {later layer: (its input, whether its length is known)}.
        """
        passes, sure = self._without_chance(image, inputs)
        return bool(sure) and not _any_leaves(passes, sure)

    def agrees(self, image: torch.Tensor, inputs: Mapping[str, tuple[torch.Tensor, bool]]) -> bool:
        """Whether there are such layers, and they saw what this image leaves."""
        passes, sure = self._without_chance(image, inputs)
        return bool(sure) and _any_leaves(passes, sure)

    def _without_chance(
        self, image: torch.Tensor, inputs: Mapping[str, T]
    ) -> tuple[list[dict[str, list[torch.Tensor]]], dict[str, T]]:
        """(what passes through the layers, as the client trained and as its network answers; those
        ``inputs`` that chance does not reach).
        """
        answered = self._pass(image)
        try:
            train, again = (self._pass(image, train=True, seed=seed) for seed in (0, 1))
        except Exception:  # one image in batch norm
            train = again = answered
        every = train.keys() & again.keys() & answered.keys()
        sure = {
            name: each
            for name, each in inputs.items()
            if name in every and train[name][0].equal(again[name][0])
        }
        return [train, answered], sure

    def leads_elsewhere(
        self,
        name: str,
        values: torch.Tensor,
        inputs: Mapping[str, tuple[torch.Tensor, bool]],
    ) -> bool:
        """The same of what a layer's input leaves behind it."""
        try:
            behind = self.behind(name, values) - {name}
            with self.instead(name, values[None]):
                later = {each: inputs[each] for each in behind if each in inputs}
                return bool(later) and self.disagrees(self.grey(), later)
        except Exception:  # whatever a user's network raises
            return False

    def gradients(
        self,
        weight: str,
        bias: str | None,
        image: torch.Tensor,
        *,
        train: bool = False,
        seed: int = 0,
    ) -> list[torch.Tensor]:
        """Of both, or of a weight alone, for an image and some loss of what the network returns;
        with other numbers in the bias, since of a black image ReLU may let nothing through.
        """
        parameters = dict(self.model.named_parameters())
        given = [] if bias is None else [parameters[bias]]
        own = [each.clone() for each in given]
        draw = torch.Generator().manual_seed(0)
        try:
            for each in given:
                each.copy_(torch.randn(each.shape, generator=draw))
            self._train(True)
            self._pass(image, train=train, grad=True, seed=seed)
            total = torch.stack([(each * _slope(each)).sum() for each in _tensors(self.returned)])
            grads = torch.autograd.grad(total.sum(), [parameters[weight], *given])
        finally:
            self._train(False)
            for each, kept in zip(given, own):
                each.copy_(kept)
        return [each.double() for each in grads]

    def add(self, name: str, inputs: torch.Tensor, *, steady: bool) -> None:
        """Take in what ``probes`` leave [5, features] of a weight that is no linear layer's, and
        whether training leaves it so.
        """
        self.rows[name] = 1
        self.maps[name] = self._map_of(inputs) if steady else None

    def never_zero(self, name: str) -> bool:
        """Whether no number of a layer's inputs is 0 for any image, as behind sigmoid; False where
        a network does not tell.
        """
        try:
            return all(bool((each[name] != 0).all()) for each in self._drawn)
        except Exception:  # whatever a user's network raises
            return False

    @functools.cached_property
    def probes(self) -> torch.Tensor:
        """[5, pixels], by which it is seen what of an image reaches a layer: black, white, each
        pixel's place, noise, noise beyond [0, 1].
        """
        count = math.prod(self.shape)
        places = torch.arange(1, count + 1, dtype=torch.float64) / count
        noise = torch.rand(count, generator=self.generator, dtype=torch.float64)
        beyond = 4 * noise.flip(0) - 1.5  # of clients that normalise
        return torch.stack([torch.zeros(count), torch.ones(count), places, noise, beyond])

    def _map(self, name: str) -> "_Map | None":
        if name not in self.maps:
            self.maps[name] = self._make_map(name)
        return self.maps[name]

    def _make_map(self, name: str) -> "_Map | None":
        inputs = self._probed
        return self._map_of(inputs[name]) if name in inputs else None

    def _map_of(self, taken: torch.Tensor) -> "_Map | None":
        probes, count = self.probes, math.prod(self.shape)
        constant, factor = taken[0], taken[1] - taken[0]
        factor = torch.where(factor.abs() > torch.finfo(self.dtype).eps * 1e2, factor, 0.0)
        used = factor != 0
        position = ((taken[2] - constant)[used] / factor[used] * count - 1).round().long()
        if not used.any() or position.min() < 0 or position.max() >= count:
            return None
        expected = constant.repeat(2, 1)
        expected[:, used] += factor[used] * probes[3:].to(constant)[:, position]
        found = self.close(taken[3:], expected)
        every = len(position.unique()) == count
        return _Map(position, factor, constant) if found and every else None

    @functools.cached_property
    def _probed(self) -> dict[str, torch.Tensor]:
        """What of the ``probes`` reaches each layer [5, features]. Layers are left out whose input
        training changes, chance, or the other images of a batch: dropout, noise, or batch norm's
        own statistics in front of them.
        """
        images = self.probes.reshape(-1, *self.shape)
        names = {name for name, rows in self.rows.items() if rows == 1}
        drawn: set[str] = set()

        def each(start: int, *, train: bool) -> dict[str, list[torch.Tensor]]:
            passed = []
            for i, image in enumerate(images):
                passed.append(self._pass(image[None], train=train, seed=start + i))
                drawn.update(self.by_chance)
            return {
                name: [one[name][0].flatten() for one in passed]
                for name in names
                if all(name in one for one in passed)  # a network may skip it
            }

        in_eval = each(0, train=False)
        try:
            in_training = each(len(images), train=True)
        except Exception:  # batch norm, which takes no statistic of one image
            try:
                passed = self._pass(images, train=True, seed=len(images))
            except Exception:  # a network that asks for more in training: what it does is not known
                return {}
            drawn.update(self.by_chance)
            in_training = {name: list(passed[name][0].flatten(1)) for name in names & passed.keys()}
        alone = {name: torch.stack(inputs) for name, inputs in in_eval.items()}
        try:
            passed = self._pass(images)
            together = {name: passed[name][0].flatten(1) for name in names & passed.keys()}
        except Exception:  # a network that takes one image
            together = alone
        return {
            name: inputs
            for name, inputs in alone.items()
            if name not in drawn
            and name in together.keys() & in_training.keys()
            and together[name].shape == inputs.shape
            and self.close(together[name], inputs)
            and all(map(torch.equal, in_eval[name], in_training[name]))
        }

    def apart(self, name: str) -> tuple[float, float]:
        """(least, greatest) distance between a layer's inputs of two images, over their size; both
        ``AWAY`` where a network does not tell.
        """
        try:
            passed = torch.stack([each[name].flatten() for each in self._drawn])
        except Exception:  # whatever a user's network raises
            return AWAY, AWAY
        distances = torch.pdist(passed) / passed.norm(dim=1).mean().clamp(min=TINY)
        return float(distances.min()), float(distances.max())

    def has_mean(self, name: str) -> bool:
        """Whether the numbers of a layer's inputs do not add up to 0 whatever the image is, as
        behind layer norm; False where a network does not tell.
        """
        try:
            passed = [each[name].flatten() for each in self._drawn]
        except Exception:  # whatever a user's network raises
            return False
        return all(bool(x.sum().abs() > NEAR * x.norm()) for x in passed)

    @functools.cached_property
    def _drawn(self) -> list[dict[str, torch.Tensor]]:
        """What passes through the layers, for each of a few smooth images alone."""
        draw = torch.Generator().manual_seed(0)
        to_images, _ = priors.root("smooth", self.shape)
        white = torch.randn(DRAWN, 1, *self.shape, generator=draw, dtype=torch.float64)
        passes = (self._pass((0.5 + to_images(each)).clamp(0, 1)) for each in white)
        return [{name: given[0] for name, given in each.items()} for each in passes]

    def tells_apart(
        self,
        name: str,
        values: torch.Tensor,
        left: torch.Tensor,
        hidden: float,
        loss: Loss,
        away: float = AWAY,
    ) -> bool:
        """Whether δ turns where this input changes: then two inputs would show as two. It does not
        in a network of one output, or of two classes, whose units are switched and not smooth, and
        where the scores are so far apart that the softmax has saturated. And whether it turns by
        so much that it is not ``hidden`` by rounding: the relative size of a direction that is,
        where the inputs are so far ``away``, relative to their size.
        Whatever the label is; where one explains ``left``, the direction of δ, whatever that is.
        Of a loss of constant slopes δ turns only where the network between does.
        """
        noise = torch.randn(PROBES, len(values), generator=self.generator, dtype=torch.float64)
        one = torch.ones_like(noise[:1])
        given = values * torch.cat([one, 1 + self.near * noise, 1 + away * noise]).to(values)
        try:
            signals = self._signals(name, given, left, loss)
            enough = FITS if loss.seen else FITS_EXACTLY
            fits = [s for s in signals if F.cosine_similarity(s[0], left, 0).abs() > enough]
            if not fits and repeats(left, hidden):  # a loss of constant slopes, for any images
                return False
            turned = torch.stack([_turned(each) for each in fits or signals])
        except Exception:  # a network that takes one image, or gives no gradient: nothing is known
            return False
        near, far = turned[:, :PROBES].amax(1), turned[:, PROBES:].amax(1)
        turns = max(TURNS * self.near, 1e2 * torch.finfo(self.dtype).eps)
        return bool((near > turns).all() and (far > HIDDEN * hidden).all())

    def _signals(
        self, name: str, given: torch.Tensor, left: torch.Tensor, loss: Loss
    ) -> list[torch.Tensor]:
        """dL/dz at the layer's output for each input [N, features], L the usual loss, or one of
        constant slopes, which it may be as well where it was not seen; for the labels whose classes
        have the highest scores and the lowest, since others turn no less, and for the class that
        moved most where ``left`` is of the scores.
        """
        kept: dict[str, torch.Tensor] = {}

        def keep(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            kept["output"] = output.detach().requires_grad_()
            return kept["output"].clone()  # which the next layer may overwrite

        hook = self.layers[name].register_forward_hook(keep)
        self.model.eval()
        try:
            with (
                self.instead(name, given),
                torch.enable_grad(),
                own_generator(seed=0, device=self.device),
            ):
                grey = self.grey(len(given)).to(self.device, self.dtype)
                output = scores(self.model(grey)).flatten(1)
                losses = [F.softplus(output).sum()]
                slopes = loss.slopes
                if slopes is not None and len(slopes) == output.shape[1]:
                    losses = [(output @ slopes.to(output)).sum()]
                elif output.shape[1] > 1:
                    order = output[0].argsort()
                    labels = {int(order[at]) for at in (0, -1, -2)}
                    if len(left) == output.shape[1]:
                        labels.add(int(left.abs().argmax()))
                    losses = [
                        F.cross_entropy(output, torch.full_like(output[:, 0], label).long())
                        for label in sorted(labels)
                    ]
                if not loss.seen:
                    losses.append((output * _slope(output[0])).sum())
                return [
                    torch.autograd.grad(each, kept["output"], retain_graph=True)[0]
                    .double()
                    .flatten(1)
                    for each in losses
                ]
        finally:
            hook.remove()


def _same_state(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether no number was drawn in between."""
    return all(numpy.array_equal(a, b) for a, b in zip(one, other))


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    used = expected.abs() > ABSENT * expected.abs().max()
    return bool(F.cosine_similarity(found[used], expected[used], 0).abs() > ALIKE)


def _any_leaves(
    passes: Iterable[Mapping[str, list[torch.Tensor]]],
    inputs: Mapping[str, tuple[torch.Tensor, bool]],
) -> bool:
    """Whether these are the inputs of layers in one of the passes."""
    return any(
        all(_same(passed[name][0].flatten(), *each) for name, each in inputs.items())
        for passed in passes
    )


def _same(found: torch.Tensor, expected: torch.Tensor, scaled: bool) -> bool:
    """Whether two inputs are one but for half precision, and but for a factor where the length is
    not known.
    """
    if not scaled:
        expected = (found @ expected) / expected.square().sum() * expected
    return bool((found - expected).norm() <= SAME * expected.norm())


def repeats(signal: torch.Tensor, hidden: float) -> bool:
    """Whether most numbers of a δ are of one size with another, as of a hinge or absolute loss: its
    slopes are then the same for all images of a class. Below ``hidden`` rounding hides how they
    differ.
    """
    sizes = (signal.abs() / signal.abs().max()).sort().values
    sizes = sizes[sizes > NOISE * hidden]
    if len(sizes) < 2:
        return True
    gaps = sizes.diff()
    same = gaps < NOISE * hidden
    if not same.double().mean() > 0.5:
        return False
    # of very many classes neighbours are near, whatever the loss: one size is as wide as rounding
    group = torch.cat([same.new_zeros(1), ~same]).cumsum(0)
    beyond = sizes - sizes[torch.searchsorted(group, group)] > NOISE * hidden
    return bool(group[-1] + 1 + beyond.sum() <= max(3, len(sizes) // LEVELS))


def _turned(signals: torch.Tensor) -> torch.Tensor:
    """By how much each direction is another than the first, from 0 to 1."""
    first = signals[0] / signals[0].norm()
    beside = signals[1:] - (signals[1:] @ first)[:, None] * first
    return (beside.norm(dim=1) / signals[1:].norm(dim=1)).nan_to_num()


def _tensors(returned: Any) -> Iterator[torch.Tensor]:
    """What a network returns that has a gradient."""
    if isinstance(returned, torch.Tensor):
        if returned.requires_grad:
            yield returned
    elif isinstance(returned, Mapping):
        for each in returned.values():
            yield from _tensors(each)
    elif isinstance(returned, (list, tuple)):
        for each in returned:
            yield from _tensors(each)


def _slope(like: torch.Tensor) -> torch.Tensor:
    """Another number for each entry, so that none cancel."""
    return torch.linspace(1, 2, like.numel()).to(like).reshape(like.shape)
