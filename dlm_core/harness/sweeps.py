"""Run many trials: keep what is finished, use all cores or a cluster, show the time left, return a
table.
"""

import contextlib
import dataclasses
import enum
import functools
import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dlm_core import check
from dlm_core.harness import registry, tables
from dlm_core.harness.interrupts import kept_from_workers
from dlm_core.harness.paths import home
from dlm_core.records import plain

PATIENCE = "10s"  # with a Dask scheduler that does not answer
ONE_AT_A_TIME = (
    threading.Lock()
)  # in a process: a trial's one torch thread, and a network's seed, are the whole process's


class Default(enum.Enum):
    """Stands for the store that is taken where none is named."""

    STORE = "DLM_STORE, or .store in the repository"


class Store:
    """Finished records, one safetensors file each, written atomically; survives kill -9.

    A file that cannot be read is reported with a warning and its trial computed again.

    Parameters
    ----------
    folder
        Where they lie; it is made where it does not exist.

    Raises
    ------
    ValueError
        Where it cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f".writable-{os.getpid()}", "w"):
                pass
            os.remove(self.folder / f".writable-{os.getpid()}")
        except OSError as error:
            raise ValueError(
                f"store folder {str(folder)!r} cannot be written ({error.strerror}); choose another"
            ) from None

    def path(self, trial: Any) -> Path:
        """The file of a trial's record, by its ``key``."""
        return self.folder / trial.key[:2] / f"{trial.key}.safetensors"

    def get(self, trial: Any) -> dict[str, Any] | None:
        """The record, or None where there is none that can be read."""
        from safetensors import SafetensorError, safe_open

        path = self.path(trial)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["record"])
                names = file.keys()  # not a mapping: it has no items()
                record["arrays"] = {name: file.get_tensor(name) for name in names}
                return record
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(
                f"store entry {path.name} is damaged ({error}) and is computed again", stacklevel=2
            )
            return None

    def put(self, trial: Any, record: Mapping[str, Any]) -> None:
        """Keep a trial's record, whole or not at all."""
        from safetensors.torch import save

        path = self.path(trial)
        path.parent.mkdir(exist_ok=True)
        numbers = {name: value for name, value in record.items() if name != "arrays"}
        tensors = record["arrays"] or {"empty": torch.zeros(1)}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_bytes(
                save(
                    tensors,
                    metadata={"record": json.dumps(numbers), "trial": json.dumps(plain(trial))},
                )
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sweep(
    trials: Iterable[Any],
    *,
    jobs: int | None = None,
    store: str | Path | None | Default = Default.STORE,
    scheduler: str | None = None,
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

    Notes
    -----
    Records are stored one by one as they finish, so that an interrupt loses only what is under way.
    Keys are computed here, once, and never by a worker.
    """
    import joblib

    trials = list(trials)
    jobs = int(jobs or os.environ.get("DLM_JOBS") or os.cpu_count() or 1)
    check.at_least("jobs", jobs, 1)
    if store is Default.STORE:
        store = os.environ.get("DLM_STORE") or home() / ".store"
    shelf = None if store is None else Store(store)
    records: dict[Any, Any] = {trial: shelf.get(trial) if shelf else None for trial in trials}
    missing = [trial for trial, record in records.items() if record is None]
    scheduler = scheduler or os.environ.get("SCHEDULER")
    master = None if scheduler else os.getpid()
    shipment = registry.shipped()
    with (
        _progress(len(records), len(records) - len(missing)) as bar,
        engine(scheduler, jobs),
        warnings.catch_warnings(),
    ):
        # joblib replaces workers that have grown; no trial is lost
        warnings.filterwarnings("ignore", "A worker stopped")
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        calls = (
            joblib.delayed(_numbered)(i, trial, master, shipment) for i, trial in enumerate(missing)
        )
        with kept_from_workers():
            finished = parallel(calls)
        for i, record in finished:
            if shelf:
                shelf.put(missing[i], record)
            records[missing[i]] = record
            bar.update()
    return [record for trial in trials if (record := records[trial]) is not None]


def table(trials: Iterable[Any], records: Iterable[Mapping[str, Any]]) -> Any:
    """A pandas DataFrame with one row per trial.

    Parameters
    ----------
    trials
        Dataclasses; a row has their fields, options spread out.
    records
        One for each trial, in the same order; a row has their numbers, "arrays" aside.
    """
    import pandas

    rows = []
    for trial, record in zip(trials, records, strict=True):
        numbers = {name: value for name, value in record.items() if name != "arrays"}
        rows.append({**_flat(trial), **numbers})
    return pandas.DataFrame(rows)


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
    from scipy.stats import binomtest

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
            interval = binomtest(successes, len(group)).proportion_ci(method="wilson")
            row |= {
                f"success_{threshold}": successes / len(group),
                f"low_{threshold}": interval.low,
                f"high_{threshold}": interval.high,
            }
        row |= {f"psnr_{q}": tables.quantile(psnr, q / 100) for q in (25, 50, 75)}
        for name, worst in (("ssim", -math.inf), ("lpips", math.inf), ("released_psnr", -math.inf)):
            values = tables.column(group, name).where(psnr > -math.inf, worst)
            row[name] = tables.quantile(values, 0.5, worst)
        row["released_20"] = (tables.column(group, "released_psnr") >= 20).mean()
        row["labels_right"] = tables.column(group, "labels_right").fillna(0).mean()
        rows.append(row)
    return pandas.DataFrame(rows)


def _numbered(
    i: int, trial: Any, master: int | None, shipment: bytes
) -> tuple[int, dict[str, Any]]:
    """(i, the trial's record), in a worker or in the process that planned the sweep."""
    if master != os.getpid():
        registry.receive(shipment)
        if master is not None:
            end_with(master)
    with ONE_AT_A_TIME:
        return i, trial.run()


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
def engine(scheduler: str | None, jobs: int) -> Iterator[None]:
    """joblib's processes on this machine, or its Dask backend on a cluster.

    Parameters
    ----------
    scheduler
        Address of a Dask scheduler, tcp://…; None or "" for this machine.
    jobs
        Processes on this machine, at least 1; 1 starts none.

    Raises
    ------
    ConnectionError
        Where the scheduler does not answer.
    """
    import joblib

    if not scheduler:
        with joblib.parallel_config(backend="loky" if jobs > 1 else "sequential", n_jobs=jobs):
            yield
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
    with client, joblib.parallel_config(backend="dask"):
        yield


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
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(f"{self.done} {self.total}")
        os.replace(temporary, self.path)
