"""One battery for every attack and every defence, ours and yours.

    battery.check_attack("mine")
    battery.check_defence("mine", strength=0.1, neutral={"strength": 0.0})

A record that says ``example={"strength": 0.1}`` and ``neutral={"strength": 0.0}`` need not be told.
Each raises AssertionError with one sentence that says what is wrong, as scikit-learn's
``check_estimator`` does; they take seconds on a CPU.
"""

import copy
import inspect
import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dlm_core import check, data, defenses, federated, models, records
from dlm_core.harness import registry  # noqa: F401  so that the tables are full
from dlm_core.observation import Observation
from dlm_core.records import ATTACKS, DATA_SETS, DEFENCES, Attack, Defence, Options
from dlm_core.results import Evidence, Reconstruction, SearchEvidence, Status
from dlm_core.weights import StateDict

MISSPELT = "no_such_option"
DRAWS = 8  # pairs of them, by which the variance of a defence's noise is measured
WITHIN = 2.0  # factor that it may be off
ON_GPU = 1e-3  # of a pixel: from one run to the next
SLACK = 1 / 512  # by which a pixel may lie outside [0, 1]: half a step of 8 bits


@dataclass(frozen=True)
class Scene:
    """A client whose update is attacked in a moment.

    Attributes
    ----------
    dataset
        Key of ``records.DATA_SETS``; of it the first images.
    network, network_options
        Of ``models.build``.
    client_optimizer, learning_rate
        Of ``federated.train_locally``, for one step.
    num_rounds
        None: one Observation. Else a list of that many, the client's rounds.
    """

    dataset: str = "digits"
    network: str = "lenet"
    network_options: Options = Options()
    client_optimizer: str = "sgd"
    learning_rate: float = 0.05
    num_rounds: int | None = None

    def observe(
        self,
        num_images: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """What is seen of it: an Observation, or a list of them.

        Parameters
        ----------
        num_images
            In the client's step.
        device, dtype
            Of the client's network and images.
        """
        record = DATA_SETS[self.dataset]
        images, labels, *_ = data.load(self.dataset, n=num_images, source="bundled")
        images, labels = images.to(device, dtype), labels.to(device)
        model = models.build(
            self.network,
            record.image_shape,
            record.num_classes,
            seed=3,
            **self.network_options,
        ).to(device, dtype)
        training: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "client_optimizer": self.client_optimizer,
        }
        if self.num_rounds is None:
            return federated.train_locally(model, images, labels, **training)
        rounds = federated.rounds(model, [(images, labels)], num_rounds=self.num_rounds, **training)
        return [seen[0] for _, seen in rounds]


PLAIN = Scene()
BATCH_NORM = Scene("fashion_mnist", "resnet18_bn", Options(width=2, blocks=1))
BUDGETS = {"local_steps": 2, "max_evaluations": 20, "max_rounds": 5, "max_steps": 4}
# What attacks demand that is the same thing in each of them.
TOLD: dict[str, Any] = {
    "defence": {"name": "noise", "scale": 1e-4, "observer": "server"},
    "k0": 20.0,
    "learning_rate": PLAIN.learning_rate,
}


def check_attack(
    attack: Attack | str,
    *,
    scene: Any = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> None:
    """Check that an attack does what every attack must do.

    Parameters
    ----------
    attack
        A record, or its key in ``records.ATTACKS``.
    scene
        A ``Scene`` that the attack is for, or any object with its method ``observe``. None
        takes that of its record.
    device
        On which the client's network lies.
    **options
        Of the attack: what it has to be told, and its budget. ``TOLD``, ``BUDGETS`` and the
        record's ``example`` go before.

    Raises
    ------
    AssertionError
        With a sentence, where it does not: it takes ``num_images`` and ``seed`` and any
        client's device and precision; it leaves the Observation and the global random generators as
        they were; the same seed gives the same bits (on a GPU, where sums are taken in any order,
        the same images to ``ON_GPU``), and of a search another one another start where its record
        says that it is seeded; it returns a ``Reconstruction`` of as many images in [0, 1], or
        refuses in one sentence what does not suit it; its record refuses bad input likewise (the
        function called by itself is not asked).
    ValueError
        For a key that is not in ``records.ATTACKS``.
    """
    record = _of("attack", attack, ATTACKS)
    scene = scene or Scene(**record.scene)
    usual: dict[str, Any] = {name: n for name, n in BUDGETS.items() if name in record.options}
    usual |= {name: TOLD[name] for name in record.demands if name in TOLD}
    options = {**usual, **record.example, **options}
    _check_told(record, options)

    seen = scene.observe(device=device)
    found = _attacked(record, seen, 1, options)
    again = _attacked(record, seen, 1, options)
    for part in ("images", "labels", "losses"):
        if not _repeated(getattr(found, part), getattr(again, part), found.images.is_cuda):
            _fail(record, f"gives other {part} for the same seed")

    _attacked(record, scene.observe(device=device, dtype=torch.float64), 1, options)
    several = scene.observe(2, device=device)
    if record.several:
        _attacked(record, several, 2, options, may_refuse=True)
    else:
        _check_refused(record, partial(record, several, num_images=2, **options), "num_images")
    for name, value in {"num_images": 0, "seed": -1, MISSPELT: 1}.items():
        _check_refused(record, partial(record, seen, **{**options, name: value}), name)
    _check_seeded(record, found, _attacked(record, seen, 1, options, seed=2))


def _of(kind: str, given: Any, known: Mapping[str, Any]) -> Any:
    """The record that was given, by itself or by its key."""
    if not isinstance(given, str):
        return given
    check.one_of(kind, given, known)
    return known[given]


def check_defence(
    defence: Defence | str, *, neutral: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Check that a defence does what every defence must do.

    Parameters
    ----------
    defence
        A record in ``records.DEFENCES``, or its key.
    neutral
        Its options at strength zero, where it must be the identity; those of its record go
        before.
    **options
        Of the defence, at a middling strength; the record's ``example`` goes before.

    Raises
    ------
    AssertionError
        With a sentence, where it does not: it changes nothing in place and no buffer; the
        same seed gives the same bits and another one others, if it is random; names, shapes and
        precisions stay; strength zero is the identity; misspelt options are refused; the variance
        that its record promises is, summed over all entries and within a factor of two, what an
        observer finds, and so are the coordinates kept.
    ValueError
        For a key that is not in ``records.DEFENCES``.
    """
    record = _of("defence", defence, DEFENCES)
    if DEFENCES.get(record.key) != record:
        _fail(record, "is not in records.DEFENCES: register it with records.defence")
    options = {**record.example, **options}
    neutral = {**record.neutral, **(neutral or {})}
    _check_demands(record, options)
    run = _RUNS[record.acts_on](record)
    _check_output(record, run, options)
    if neutral:
        _check_neutral(record, run, neutral)
    misspelt = {**options, MISSPELT: 1}
    _check_refused(record, partial(record.check_options, "option", misspelt), MISSPELT)
    seen = PLAIN.observe()
    if record.acts_on == "training":
        _check_refused(record, partial(defenses.defend, seen, record.key, **options), record.key)
        return
    _check_refused(record, partial(defenses.defend, seen, record.key, **misspelt), MISSPELT)
    seeded = Options(options, seed=1)
    _check_refused(record, partial(defenses.Setting, record.key, seeded), "seed")
    _check_setting(record, seen, options)


def _check_demands(record: Attack | Defence, options: Mapping[str, Any]) -> None:
    lacking = [name for name in record.demands if name not in options]
    if lacking:
        _fail(record, f"demands {', '.join(lacking)}: give its record an example of each")


def _check_told(record: Attack, options: Mapping[str, Any]) -> None:
    _check_demands(record, options)
    for name in record.demands:
        if name.replace("_", " ") not in record.told:
            _fail(record, f"demands {name}, which its record does not count as told")


def _attacked(
    record: Attack,
    seen: Any,
    num_images: int,
    options: Mapping[str, Any],
    *,
    may_refuse: bool = False,
    seed: int = 1,
) -> Any:
    """The result on ``seen``, once it is found to be well-formed and to have left all as it was."""
    with _untouched(record, seen):
        try:
            found = record(seen, num_images=num_images, seed=seed, **options)
        except Exception as error:
            if may_refuse and isinstance(error, ValueError) and _is_sentence(error):
                return None
            _fail(record, f"raises {_first(error)} on its own scene", error)
    first = seen[0] if isinstance(seen, list) else seen
    _check_result(record, first, found, num_images)
    return found


def _check_result(record: Attack, seen: Observation, found: Any, num_images: int) -> None:
    if not isinstance(found, Reconstruction):
        _fail(record, f"returns a {type(found).__name__}, not a Reconstruction")
    shape = (num_images, *seen.image_shape)
    if found.images.shape != shape or not found.images.is_floating_point():
        _fail(
            record,
            f"returns images of shape {list(found.images.shape)} and dtype {found.images.dtype} "
            f"where {list(shape)} of floating point are due",
        )
    if not found.images.isfinite().all():
        _fail(record, "returns images that hold NaN or infinity")
    low, high = float(found.images.min()), float(found.images.max())
    if not -SLACK <= low <= high <= 1 + SLACK:
        _fail(record, f"returns images from {low:.4g} to {high:.4g}; pixels lie in [0, 1]")
    labels = found.labels
    if labels.shape != (num_images,) or labels.dtype != torch.int64:
        _fail(record, f"returns labels {labels}, not {num_images} class indices of torch.int64")
    if labels.min() < -1 or labels.max() >= seen.num_classes:
        _fail(record, f"returns labels {labels.tolist()} of {seen.num_classes} classes")
    if not isinstance(found.status, Status):
        _fail(record, f"has status {found.status!r}, which is no results.Status")
    vouched = found.vouched
    if vouched.shape != (num_images,) or vouched.dtype != torch.bool:
        _fail(record, f"has vouched {vouched}, not {num_images} booleans")
    if not isinstance(found.evidence, Evidence):
        _fail(record, f"has a {type(found.evidence).__name__} for evidence, no results.Evidence")
    try:
        pickle.dumps(found)
    except Exception as error:
        _fail(record, f"returns what no process can send to another: {_first(error)}", error)
    if found.status is Status.BASELINE:
        return
    if not found.seconds > 0:
        _fail(record, f"says it took {found.seconds} seconds")
    device = next(seen.model.parameters()).device
    if found.images.device != device:
        _fail(record, f"returns images on {found.images.device} for a network on {device}")


def _check_seeded(record: Attack, found: Any, other: Any) -> None:
    """An audit that searches again from another seed takes two ends at one picture for evidence."""
    if not record.seeded and "seed" in inspect.signature(record.function).parameters:
        _fail(record, "takes a seed: its record says seeded=False")
    parts = ("images", "losses")
    same = all(_equal(getattr(found, part), getattr(other, part)) for part in parts)
    if record.seeded and same and isinstance(found.evidence, SearchEvidence):
        _fail(record, "gives the same images for another seed: its record says seeded=True")


@contextmanager
def _untouched(record: records.Record, seen: Any) -> Iterator[None]:
    """Fails where what is done inside changes an Observation or a global random generator."""
    everything = seen if isinstance(seen, list) else [seen]
    kept = copy.deepcopy([_contents(each) for each in everything])
    generators = _generators()
    yield
    for each, had in zip(everything, kept):
        for name, value in _contents(each).items():
            if not _equal(value, had[name]):
                _fail(record, f"changes {name} of the Observation that it is given")
    if not _equal(_generators(), generators):
        _fail(
            record, "draws from a global random generator: it takes one of its own, from its seed"
        )


def _contents(seen: Observation) -> dict[str, Any]:
    """All that nobody may write into."""
    held: dict[str, Any] = {f"model.{n}": t for n, t in seen.model.state_dict().items()}
    held |= {f"weights_after.{n}": t for n, t in seen.weights_after.items()}
    held |= {f"delta.{n}": t for n, t in seen.delta_by_name.items()}
    held["the modules' mode"] = [module.training for module in seen.model.modules()]
    held["the parameters' grad"] = [p.grad is None for p in seen.model.parameters()]
    held["the parameters' requires_grad"] = [p.requires_grad for p in seen.model.parameters()]
    return held


def _generators() -> list[Any]:
    """States of the global random generators."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return [torch.get_rng_state(), random.getstate(), torch.from_numpy(keys.copy()), name, rest]


def _repeated(first: Any, again: Any, on_gpu: bool) -> bool:
    """Whether a second run gives what the first gave, as far as its device repeats itself."""
    if not on_gpu:
        return _equal(first, again)
    alike = not isinstance(first, torch.Tensor) or torch.allclose(first, again, atol=ON_GPU)
    return alike and len(first) == len(again)


def _equal(a: Any, b: Any) -> bool:
    """Equality to the bit, of tensors and of lists of what may be tensors; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b or (a != a and b != b))


def _check_refused(record: records.Record, call: Callable[[], Any], name: str) -> None:
    """Fails unless ``call`` raises a ValueError of one sentence that has ``name`` in it."""
    try:
        call()
    except ValueError as error:
        if _is_sentence(error) and name in str(error):
            return
        _fail(record, f"refuses a wrong {name}, but does not say so in one sentence: {error}")
    except Exception as error:
        _fail(record, f"answers a wrong {name} with {type(error).__name__}, not with a ValueError")
    _fail(record, f"takes a wrong {name} without a word")


def _is_sentence(error: Exception) -> bool:
    return len(str(error)) > 10 and "\n" not in str(error)


def _first(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__} ({next(iter(str(error).splitlines()), '')})"


def _fail(record: records.Record, what: str, error: Exception | None = None) -> Any:
    raise AssertionError(f"{type(record).__name__.lower()} {record.key!r} {what}") from error


def _called(record: records.Record, function: Callable[..., Any], *given: Any, **how: Any) -> Any:
    """What a function of the record returns."""
    try:
        return function(*given, **how)
    except Exception as error:
        _fail(record, f"raises {_first(error)}", error)


# --- defences: {what they act on: record -> run(options, seed) -> {name: tensor}}, inputs checked


def _runs_on_snapshots(record: Defence) -> Callable[..., StateDict]:
    seen = BATCH_NORM.observe()
    weights, names = seen.weights_after, seen.parameter_names

    def run(options: Mapping[str, Any], seed: int) -> StateDict:
        own = {"seed": seed} if record.random else {}
        with _untouched(record, seen):
            found = _called(record, record.function, weights, parameters=names, **own, **options)
        if not isinstance(found, dict) or found.keys() != weights.keys():
            _fail(record, "does not return a state dict of the same names")
        _check_like(record, weights, found)
        for name in weights.keys() - set(names):
            if not torch.equal(found[name], weights[name]):
                _fail(record, f"changes {name}, which is no parameter")
        return found

    return run


def _runs_on_updates(record: Defence) -> Callable[..., StateDict]:
    seen = PLAIN.observe()

    def run(options: Mapping[str, Any], seed: int) -> StateDict:
        own = {"seed": seed} if record.random else {}
        with _untouched(record, seen):
            found = list(_called(record, record.function, seen.delta, **own, **options))
        if len(found) != len(seen.delta):
            _fail(record, f"returns {len(found)} tensors for an update of {len(seen.delta)}")
        named = dict(zip(seen.parameter_names, found))
        _check_like(record, seen.delta_by_name, named)
        return named

    return run


def _runs_in_training(record: Defence) -> Callable[..., StateDict]:
    images, labels, *_ = data.load("digits", n=2)
    model = PLAIN.observe().model

    def run(options: Mapping[str, Any], seed: int) -> StateDict:
        own = {"seed": seed} if record.random else {}
        before = copy.deepcopy([model.state_dict(), images, labels])
        state = _generators()
        seen = _called(record, record.function, model, images, labels, **own, **options)
        if not _equal([model.state_dict(), images, labels], before):
            _fail(record, "changes what it is given")
        if not _equal(_generators(), state):
            _fail(record, "draws from a global random generator")
        if not isinstance(seen, Observation):
            _fail(record, f"returns a {type(seen).__name__}, not an Observation")
        return dict(seen.weights_after)

    return run


_RUNS: dict[str, Callable[[Defence], Callable[..., StateDict]]] = {
    "snapshot": _runs_on_snapshots,
    "update": _runs_on_updates,
    "training": _runs_in_training,
}


def _check_like(
    record: Defence, given: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> None:
    for name, tensor in given.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            _fail(record, f"returns {name} in another shape or precision")


def _check_output(
    record: Defence, run: Callable[..., StateDict], options: Mapping[str, Any]
) -> None:
    first, again, other = run(options, 1), run(options, 1), run(options, 2)
    if not _equal(first, again):
        how = "for the same seed" if record.random else "each time: its record says random=False"
        _fail(record, f"gives other tensors {how}")
    if record.random and _equal(first, other):
        _fail(record, "gives the same tensors for another seed: its record says random=True")


def _check_neutral(
    record: Defence, run: Callable[..., StateDict], neutral: Mapping[str, Any]
) -> None:
    found = run(neutral, 1)
    if record.acts_on == "training":
        images, labels, *_ = data.load("digits", n=2)
        plain = federated.train_locally(
            PLAIN.observe().model, images, labels, learning_rate=neutral["learning_rate"]
        )
        same = all(torch.allclose(found[n], w, atol=1e-6) for n, w in plain.weights_after.items())
    elif record.acts_on == "update":
        same = _equal(found, PLAIN.observe().delta_by_name)
    else:
        same = _equal(found, BATCH_NORM.observe().weights_after)
    if not same:
        _fail(record, f"is not the identity at {dict(neutral)}")


def _check_setting(record: Defence, seen: Observation, options: Mapping[str, Any]) -> None:
    """What ``defenses.Setting`` tells an attacker is what the server sees."""
    setting = defenses.Setting(record.key, Options(options), observer="server")
    how = {"observer": "server", **options}
    defend = partial(_called, record, defenses.defend, seen, record.key, **how)
    sent = defend(seed=0)
    if record.random and record.variance is None:
        # An attacker must not take noise of unknown variance for none.
        _check_refused(record, partial(setting.noise_variance, sent), "variance")
        return
    variances = _called(record, setting.noise_variance, sent)
    if len(variances) != len(seen.delta):
        _fail(record, f"has {len(variances)} variances for {len(seen.delta)} parameters")
    if not all(math.isfinite(variance) and variance >= 0 for variance in variances):
        _fail(record, f"has variances {variances}; they are finite and at least 0")
    expected = sum(v * layer.numel() for v, layer in zip(variances, seen.delta))
    if record.random:
        measured = sum(_square(defend(seed=2 * i), defend(seed=2 * i + 1)) for i in range(DRAWS))
        measured /= 2 * DRAWS
        if not expected / WITHIN <= measured <= expected * WITHIN:
            _fail(record, f"adds noise of {measured:.3g} in all; its variance says {expected:.3g}")
    masks = _called(record, setting.kept, sent)
    for name, mask, d, plain in zip(seen.parameter_names, masks or [], sent.delta, seen.delta):
        if mask.shape != d.shape or mask.dtype != torch.bool:
            _fail(record, f"has no mask of {name}'s shape")
        if not torch.allclose(d[mask], plain[mask], atol=1e-7):
            _fail(record, f"changes entries of {name} that an observer takes for kept")


def _square(one: Observation, other: Observation) -> float:
    """Squared distance of two updates."""
    return sum(float((a - b).square().sum()) for a, b in zip(one.delta, other.delta))
