"""Run many trials: keep what is finished, use all cores or a cluster, show the time left, return a
table.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dlm_core import check, data
from dlm_core.harness import devices, keys, registry, tables
from dlm_core.harness.interrupts import kept_from_workers
from dlm_core.harness.paths import home, probe, write_atomically
from dlm_core.harness.trials import Trial
from dlm_core.records import plain

PATIENCE = "10s"  # with a Dask scheduler that does not answer
# In a process: a trial's one torch thread, and a network's seed, are the whole process's.
ONE_AT_A_TIME = threading.RLock()
PROCESS = uuid.uuid4().hex  # this one; a worker has another
# {trial: its record, arrays aside} of each sweep that this process has finished.
FINISHED: list[dict[Any, dict[str, Any]]] = []


class Default(enum.Enum):
    """Stands for the store that is taken where none is named."""

    STORE = "DLM_STORE, or .store in the repository"


class Failed(RuntimeError):
    """A trial raised, or its worker ended: the sentence says which, and what is kept."""


class Store:
    """Finished records, one safetensors file each, written atomically; survives kill -9.

    A file that cannot be read, that was changed, or that is another trial's is reported with a
    warning, and its trial computed again.

    Parameters
    ----------
    folder
        Where they lie; it is made where it does not exist.

    Raises
    ------
    ValueError
        Where it cannot be written.
    """

    @check.arguments
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            probe(self.folder)
        except OSError as error:
            raise ValueError(
                f"store folder {str(folder)!r} cannot be written ({error.strerror}); choose another"
            ) from None

    def path(self, key: str) -> Path:
        """The file of a record, by its trial's key."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, trial: Any, key: str | None = None) -> dict[str, Any] | None:
        """The record, or None where there is none that can be trusted.

        Parameters
        ----------
        trial
            What was asked for.
        key
            Its ``key``, where it is known.
        """
        from safetensors import SafetensorError, safe_open

        key = key or trial.key
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                names = file.keys()  # not a mapping: it has no items()
                tensors = {name: file.get_tensor(name) for name in names}
            if about.pop("digest", None) != _digest(about, tensors):
                raise ValueError("its content was changed")
            if (about["key"], about["trial"]) != (key, _text(trial)):
                raise ValueError(f"it is that of another trial, {about['trial'][:60]}…")
            return {**json.loads(about["record"]), "arrays": tensors}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            warnings.warn(
                f"store entry {path.name} is damaged ({why}) and is computed again", stacklevel=2
            )
            return None

    def put(self, trial: Any, record: Mapping[str, Any], key: str | None = None) -> None:
        """Keep a trial's record, whole or not at all.

        Parameters
        ----------
        trial, key
            As in ``get``.
        record
            As its ``run`` returned it.

        Raises
        ------
        OSError
            Where it cannot be written.
        """
        from safetensors.torch import save

        key = key or trial.key
        path = self.path(key)
        numbers = _numbers(record)
        tensors = record["arrays"]
        about = {"key": key, "record": json.dumps(numbers), "trial": _text(trial)}
        content = save(tensors, metadata={**about, "digest": _digest(about, tensors)})
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise OSError(
                f"a record cannot be written to {path.parent} ({error.strerror}); "
                "those that are there are kept"
            ) from error


def _text(trial: Any) -> str:
    return json.dumps(plain(trial), sort_keys=True)


def _digest(about: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """Of what a file says and holds."""
    whole = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


class _Plan(NamedTuple):
    """What a worker has to know of a sweep beside the trial.

    Attributes
    ----------
    sweep
        A name: what a worker reads for one sweep is read anew for the next.
    process
        ``PROCESS`` of the one that planned it.
    parent
        Its number, where it started the workers; else None.
    shipment
        The user's records.
    """

    sweep: str
    process: str
    parent: int | None
    shipment: bytes


@check.arguments
def sweep(
    trials: Iterable[Any],
    *,
    jobs: check.Count | None = None,
    store: str | Path | None | Default = Default.STORE,
    scheduler: str | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Run the trials that the store lacks, and return their records in the trials' order.

    Parameters
    ----------
    trials
        Values with a ``key`` and a ``run``: ``trials.Trial``, ``utility.Federation``. What they
        name may be a user's own, registered in a notebook or a module (``dlm_core.records``):
        workers are sent it, and its code is part of the key.
    jobs
        Worker processes; default DLM_JOBS or the number of cores.
    store
        Folder of finished records; by default DLM_STORE or ".store" in the repository. None keeps
        nothing.
    scheduler
        Address of a Dask scheduler (tcp://…) to use instead of local processes; default SCHEDULER.
    device
        "cuda" or "cpu": trials run there in this process, many at once (``harness.devices``), and
        records say so; default DLM_DEVICE. Without either they run one by one on the CPU, to the
        bit the same.

    Raises
    ------
    ValueError
        Where a user's code reaches what cannot be part of a key, or be sent to workers.
    Failed
        Where a trial raises, or a worker process ends.

    Notes
    -----
    Records are stored one by one as they finish, so that an interrupt loses only what is under way.
    Keys are computed here, once, and never by a worker. Records are the same to the bit whatever
    the number of processes, and of threads in each: a process runs one trial at a time.
    """
    trials = list(trials)
    for trial in trials:
        if not callable(getattr(trial, "run", None)):
            raise ValueError(
                f"trials holds {check.shown(trial)}; it takes values with a key and a run, "
                "such as trials.Trial"
            )
    jobs = jobs or _jobs()
    if store is Default.STORE:
        store = os.environ.get("DLM_STORE") or home() / ".store"
    shelf = None if store is None else Store(store)
    scheduler = scheduler or os.environ.get("SCHEDULER")
    on = devices.named(device)
    with keys.at_once():
        names = {trial: _name(trial, on) if shelf else "" for trial in trials}
        records: dict[Any, Any] = {
            trial: shelf.get(trial, key) if shelf else None for trial, key in names.items()
        }
        missing = [trial for trial, record in records.items() if record is None]
        together = [] if on is None else [each for each in missing if isinstance(each, Trial)]
        alone = missing if on is None else [e for e in missing if not isinstance(e, Trial)]
        alone.sort(key=_budget, reverse=True)  # no worker waits at the end for a long one
        apart = bool(scheduler) or jobs > 1
        shipment = registry.shipped() if apart and alone else b""
        parent = None if scheduler else os.getpid()
        plan = _Plan(uuid.uuid4().hex, PROCESS, parent, shipment)
        with (
            _progress(len(records), len(records) - len(missing)) as bar,
            _said(len(missing), shelf),
            engine(scheduler, jobs) as finished,
        ):
            calls = ((i, trial, plan) for i, trial in enumerate(alone))
            one_by_one = ((alone[i], record) for i, record in finished(_numbered, calls))
            for trial, record in itertools.chain(one_by_one, _together(together, on)):
                if shelf:
                    shelf.put(trial, record, names[trial])
                records[trial] = record
                bar.update()
    FINISHED.append({trial: _numbers(record) for trial, record in records.items()})
    return [records[trial] for trial in trials]


def _name(trial: Any, on: torch.device | None) -> str:
    """The name of a trial's record, on a device where one is named."""
    return devices.key_on(trial.key, on) if on and isinstance(trial, Trial) else trial.key


def _budget(trial: Any) -> int:
    """The evaluations that a trial is given; 0 where it does not say."""
    return getattr(trial, "attack_options", {}).get("max_evaluations", 0)


def _together(trials: Sequence[Trial], on: torch.device | None) -> Iterator[tuple[Trial, Any]]:
    """(trial, record) of those that run on a device, many at once."""
    if on is None or not trials:
        return
    with ONE_AT_A_TIME:
        try:
            yield from ((trials[i], record) for i, record in devices.play(trials, on))
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise Failed(f"trials on {on} failed: {why}") from error


def _jobs() -> int:
    """As many as DLM_JOBS says, else as there are cores."""
    said = os.environ.get("DLM_JOBS")
    if said and not (said.isdecimal() and int(said) >= 1):
        raise ValueError(f"DLM_JOBS is {said!r}; it takes a whole number of at least 1")
    return int(said) if said else os.cpu_count() or 1


@contextlib.contextmanager
def _said(count: int, shelf: Store | None) -> Iterator[None]:
    """What ends a sweep ends it in one sentence."""
    kept = "none is kept" if shelf is None else f"those finished are kept in {shelf.folder}"
    try:
        yield
    except Failed as error:
        error.args = (f"{error}; of {count} trials to run {kept}",)
        raise
    except Exception as error:
        if not isinstance(error, BrokenExecutor) and type(error).__name__ != "KilledWorker":
            raise
        killed = " by SIGKILL, as where memory runs out" if "SIGKILL" in str(error) else ""
        raise Failed(
            f"a worker process was ended{killed}; of {count} trials to run {kept}: "
            "run again, with fewer jobs where memory is short"
        ) from error


def table(trials: Iterable[Any], records: Iterable[Mapping[str, Any]]) -> Any:
    """A pandas DataFrame with one row per trial.

    Parameters
    ----------
    trials
        Dataclasses; a row has their fields, options spread out.
    records
        One for each trial, in the same order; a row has their numbers, "arrays" aside, as
        "found.NAME" where the trial has that name itself.
    """
    import pandas

    rows = []
    for trial, record in zip(trials, records, strict=True):
        own, found = _flat(trial), _numbers(record)
        rows.append(own | {f"found.{n}" if n in own else n: each for n, each in found.items()})
    return pandas.DataFrame(rows)


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "arrays"}


def _flat(trial: Any) -> dict[str, Any]:
    """A trial's fields with those of its parts, "client.learning_rate"; a part's options stand
    among its fields.
    """
    row: dict[str, Any] = {}
    for field in dataclasses.fields(trial):
        value = getattr(trial, field.name)
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            value |= value.pop("options", {})
        if isinstance(value, Mapping):
            row |= {f"{field.name}.{name}": each for name, each in value.items()}
        elif value is not None:
            row[field.name] = value
    return row


@check.arguments
def summarise(frame: tables.Frame, by: str | Sequence[str]) -> Any:
    """Success, PSNR, SSIM and LPIPS per group of a table, as a pandas DataFrame.

    Parameters
    ----------
    frame
        As ``table`` returns it.
    by
        Columns, or one; each combination of their values has one row, in order of appearance.

    Notes
    -----
    n counts all trials, and every share and median is over all of them. One without a picture
    (``tables.WITHOUT_A_PICTURE``) is a failure in the shares: its labels are wrong, too. In medians
    and quartiles it is the worst; where one falls on such a trial, or between it and another, there
    is a gap.

    success_20 and success_30 are shares with their 95 % Wilson interval (low, high); psnr, ssim and
    lpips are medians, with the quartiles of psnr; released_20 is the share that the released code's
    PSNR of at least 20 would call a success. LPIPS is a gap where images are too small for it.
    """
    import pandas

    by = [by] if isinstance(by, str) else list(by)
    if not by:
        raise ValueError("by is empty; it takes at least one column")
    for name in by:
        check.one_of("column of by", name, frame.columns)
    rows = []
    for names, group in frame.groupby(by, sort=False, dropna=False):
        psnr = tables.psnrs(group)
        row = dict(zip(by, names)) | {"n": len(group)}
        for threshold in (20, 30):
            successes = int((psnr >= threshold).sum())
            low, high = tables.wilson(successes, len(group))
            row |= {
                f"success_{threshold}": successes / len(group),
                f"low_{threshold}": low,
                f"high_{threshold}": high,
            }
        row |= {f"psnr_{q}": tables.quantile(psnr, q / 100) for q in (25, 50, 75)}
        for name, worst in (("ssim", -math.inf), ("lpips", math.inf), ("released_psnr", -math.inf)):
            values = tables.column(group, name).where(psnr > -math.inf, worst)
            row[name] = tables.quantile(values, 0.5, worst)
        row["released_20"] = (tables.column(group, "released_psnr") >= 20).mean()
        row["labels_right"] = tables.column(group, "labels_right").fillna(0).mean()
        rows.append(row)
    return pandas.DataFrame(rows)


def _numbered(i: int, trial: Any, plan: _Plan) -> tuple[int, dict[str, Any]]:
    """(i, the trial's record), in a worker or in the process that planned the sweep."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(ONE_AT_A_TIME)
        if plan.process != PROCESS:
            registry.receive(plan.shipment)
            stack.enter_context(data.read_once(_read_for(plan.sweep)))
            if plan.parent is not None:
                end_with(plan.parent)
        try:
            return i, trial.run()
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            failed = Failed(f"{_short(trial)} failed: {why}")
            if plan.process != PROCESS:  # which no cause leaves
                failed.add_note(traceback.format_exc())
            raise failed from error


@functools.lru_cache(maxsize=1)
def _read_for(sweep: str) -> dict[Any, Any]:
    """What this worker has read of a user's data for a sweep."""
    return {}


def _short(value: Any) -> str:
    """A trial or a part of one in words: what of it is not as usual."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return check.shown(value)
    said = []
    for each in dataclasses.fields(value):
        its = getattr(value, each.name)
        usual = each.default_factory() if callable(each.default_factory) else each.default
        if its != usual:
            said.append(f"{each.name}={_short(its)}")
    return f"{type(value).__name__}({', '.join(said)})"


@functools.cache
def end_with(master: int) -> None:
    """End this worker process when ``master``, which started it, is gone: joblib's outlive one that
    was killed.
    """

    def watch() -> None:
        while os.getppid() == master:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def engine(scheduler: str | None, jobs: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Processes on this machine, by joblib, or a cluster's, by Dask.

    Parameters
    ----------
    scheduler
        Address of a Dask scheduler, tcp://…; None or "" for this machine.
    jobs
        Processes on this machine, at least 1; 1 starts none.

    Returns
    -------
    callable
        A function of a function and its calls, each a tuple of arguments: it yields what they
        return as they finish.

    Raises
    ------
    ConnectionError
        Where the scheduler does not answer.
    """
    if not scheduler:
        yield functools.partial(_here, jobs)
        return
    from dask.distributed import Client

    try:
        client = Client(scheduler, timeout=PATIENCE)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"SCHEDULER {scheduler!r} cannot be reached within {PATIENCE} "
            f"({type(error).__name__}); give the tcp:// address of a running Dask scheduler, "
            "or leave it unset to use this machine"
        ) from None
    with client:
        yield functools.partial(_there, client)


def _here(jobs: int, function: Callable[..., Any], calls: Iterable[tuple]) -> Iterator[Any]:
    import joblib

    backend = "loky" if jobs > 1 else "sequential"
    parallel = joblib.Parallel(jobs, backend, return_as="generator_unordered", batch_size=1)
    with warnings.catch_warnings():
        # joblib replaces workers that have grown; no trial is lost
        warnings.filterwarnings("ignore", "A worker stopped")
        with kept_from_workers():
            finished = parallel(joblib.delayed(function)(*each) for each in calls)
        yield from finished


def _there(client: Any, function: Callable[..., Any], calls: Iterable[tuple]) -> Iterator[Any]:
    # joblib's Dask backend runs a cluster of one thread here, and waits for a killed worker forever
    from dask.distributed import as_completed

    submitted = [client.submit(function, *each, pure=False) for each in calls]
    for future in as_completed(submitted):
        yield future.result()
        future.release()


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A bar with the time left: in a reader's notebook or terminal, or, under ``make figures``, in
    the file it watches.
    """
    from tqdm.auto import tqdm

    watched = os.environ.get("DLM_PROGRESS")
    with contextlib.ExitStack() as stack:
        if watched:
            bar = stack.enter_context(_Watched(Path(watched), total, done))
        else:
            bar = stack.enter_context(
                tqdm(
                    total=total, initial=done, unit="trial", file=sys.stderr, disable=done == total
                )
            )
        yield bar


class _Watched:
    """A bar that is a file: "done total"."""

    def __init__(self, path: Path, total: int, done: int) -> None:
        self.path, self.total, self.done = path, total, done

    def __enter__(self):
        self.write()
        return self

    def __exit__(self, *_):
        pass

    def update(self):
        self.done += 1
        self.write()

    def write(self):
        write_atomically(self.path, f"{self.done} {self.total}")
