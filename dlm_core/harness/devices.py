"""Trials on a device that is named, a GPU's or the CPU's, many at once (``beyond.lanes``).

Where none is named, trials run one after the other on the CPU, and are the same to the bit whatever
the number of processes. Here they are the same to rounding alone, under a key of their own, and
their records say on which device they ran.
"""

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dlm_core import federated
from dlm_core.beyond import lanes
from dlm_core.beyond.at_once import at_once
from dlm_core.harness import machine, scene
from dlm_core.harness.judge import arrays, judge
from dlm_core.harness.sources import code_version
from dlm_core.harness.trials import Trial
from dlm_core.observation import Observation
from dlm_core.records import ATTACKS, plain
from dlm_core.results import Reconstruction, SearchEvidence, Status
from dlm_core.search import Prepared, preparing
from dlm_core.threads import one_thread, own_generator

VARIABLE = "DLM_DEVICE"
KINDS = ("cpu", "cuda")
# Lanes at once on the CPU, where more gain little, and at most on a GPU.
ON_CPU, MOST = 16, 1024
# A lane's tensors of the size of its network, and of its images: gradients of gradients keep the
# forward and both backward passes; L-BFGS keeps 100 steps and as many changes of the gradient.
NETWORKS, IMAGES = 30, 400


def named(device: str | None = None) -> torch.device | None:
    """The device that is asked for, by the argument or by the variable ``DLM_DEVICE``; None where
    none is.

    Raises
    ------
    ValueError
        For one that is unknown, or that is not here.
    """
    device = os.environ.get(VARIABLE) if device is None else device
    if device is None:
        return None
    if device not in KINDS:
        raise ValueError(f"DEVICE is {device!r}; it takes {' or '.join(KINDS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("DEVICE is 'cuda', but PyTorch finds no CUDA device here; it takes cpu")
    return torch.device(device)


def description(device: torch.device) -> str:
    """Its kind and its name: "cuda NVIDIA H100"."""
    on_gpu = device.type == "cuda"
    return f"{device.type} {torch.cuda.get_device_name() if on_gpu else machine.processor()}"


def key_on(key: str, device: torch.device) -> str:
    """The name of a trial's record on a device, from its ``key``: the code of lanes and the kind of
    device are part of it.
    """
    parts = [key, device.type, code_version("dlm_core.beyond.lanes"), code_version(__name__)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def play(trials: Sequence[Trial], device: torch.device) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of each trial, as they finish.

    Parameters
    ----------
    trials
        Those that differ in numbers and seeds alone run together, so many at once as memory holds.
    device
        Where attacks run; clients train on the CPU.
    """
    for group in _groups(trials):
        left, most = list(group), None
        while left:
            most = most or _lanes_at_once(trials[left[0]], device)
            now = left[:most]
            found = _as_memory_allows([trials[i] for i in now], device)
            if found is None:
                most = len(now) // 2
            else:
                left = left[most:]
                yield from zip(now, found)


def _as_memory_allows(trials: Sequence[Trial], device: torch.device) -> list[dict[str, Any]] | None:
    """Their records, or None where they are too many for the device's memory."""
    try:
        return _play(trials, device)
    except torch.OutOfMemoryError:
        if len(trials) == 1:
            raise
    # Here, since an error holds on to the tensors that it was raised among.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _groups(trials: Sequence[Trial]) -> Iterable[list[int]]:
    """Numbers of trials whose searches may share a batch."""
    groups: dict[str, list[int]] = {}
    for i, trial in enumerate(trials):
        words = {n: v for n, v in trial.attack_options.items() if not isinstance(v, float)}
        told = (trial.attack, plain(words), trial.model, plain(trial.model_options))
        groups.setdefault(repr((*told, trial.dataset, trial.num_images)), []).append(i)
    return groups.values()


def _lanes_at_once(trial: Trial, device: torch.device) -> int:
    if device.type == "cpu":
        return ON_CPU
    network = scene.received(trial)
    weights = sum(p.numel() for p in network.parameters())
    pixels = trial.num_images * scene.truth_of(trial, 1)[0][0].numel()
    itemsize = 4 if trial.attack_options.get("dtype") == "float32" else 8
    restarts = trial.attack_options.get("restarts", 1)
    lane = itemsize * (NETWORKS * weights + IMAGES * pixels) * restarts
    return min(MOST, at_once(lane, device, ON_CPU))


def _play(trials: Sequence[Trial], device: torch.device) -> list[dict[str, Any]]:
    """Their records."""
    found: list[Any] = []
    truths = []
    for trial in trials:
        with one_thread(), own_generator(trial.seed):
            result, truth = _begun(trial, device)
            found.append(result)
            truths.append(truth)
    searches = [each for each in found if isinstance(each, Prepared)]
    done = iter(lanes.run(searches))
    records = []
    for result, truth in zip(found, truths):
        result = next(done) if isinstance(result, Prepared) else result
        if isinstance(result, Status):
            record: dict[str, Any] = {"stop_reason": str(result), "arrays": {}}
        else:
            result = _on_cpu(result)
            with one_thread():
                record = {**judge(result, *truth), "arrays": arrays(result)}
        records.append({**record, "device": description(device)})
    return records


def _begun(trial: Trial, device: torch.device) -> tuple[Any, Any]:
    """(a search to run, a result, or why there is none; the truth)."""
    try:
        seen, images, labels = scene.observe(trial)
    except FloatingPointError:
        return Status.CLIENT_DIVERGED, None
    except federated.Unchanged:
        return Status.CLIENT_UNCHANGED, None
    seen = [_on(each, device) for each in seen] if isinstance(seen, list) else _on(seen, device)
    try:
        if not getattr(ATTACKS[trial.attack].function, "in_lanes", False):
            return scene.attack(trial, seen, labels), (images, labels)
        with preparing():
            return scene.attack(trial, seen, labels), (images, labels)
    except torch.linalg.LinAlgError:
        return Status.SINGULAR, None


def _on(seen: Observation, device: torch.device) -> Observation:
    if device.type == "cpu":
        return seen
    after: Mapping[str, torch.Tensor] = {n: w.to(device) for n, w in seen.weights_after.items()}
    return replace(seen, model=copy.deepcopy(seen.model).to(device), weights_after=dict(after))


def _on_cpu(found: Reconstruction) -> Reconstruction:
    evidence = found.evidence
    if isinstance(evidence, SearchEvidence):
        history = [(evaluation, images.cpu()) for evaluation, images in evidence.history]
        evidence = replace(evidence, history=history)
    tensors = {name: getattr(found, name).cpu() for name in ("images", "labels", "vouched")}
    return replace(found, **tensors, evidence=evidence)
