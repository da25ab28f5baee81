"""Run many trials: keep what is finished, use all cores or a cluster, show the time left, return a table."""

import contextlib
import functools
import json
import os
import sys
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from dlm_core import check
from dlm_core.harness.paths import REPOSITORY

PATIENCE = "10s"  # with a Dask scheduler that does not answer


class Store:
    """Finished records, one safetensors file each, written atomically; survives kill -9.

    A file that cannot be read is reported with a warning and its trial computed again.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f".writable-{os.getpid()}", "w"):
                pass
            os.remove(self.folder / f".writable-{os.getpid()}")
        except OSError as error:
            raise ValueError(f"store folder {str(folder)!r} cannot be written ({error.strerror}); choose another") from None

    def path(self, trial):
        return self.folder / trial.key[:2] / f"{trial.key}.safetensors"

    def get(self, trial):
        """The record, or None where there is none that can be read."""
        from safetensors import SafetensorError, safe_open

        path = self.path(trial)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["record"])
                record["arrays"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
                return record
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"store entry {path.name} is damaged ({error}) and is computed again", stacklevel=2)
            return None

    def put(self, trial, record):
        from safetensors.torch import save

        path = self.path(trial)
        path.parent.mkdir(exist_ok=True)
        plain = {name: value for name, value in record.items() if name != "arrays"}
        tensors = record["arrays"] or {"empty": torch.zeros(1)}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_bytes(save(tensors, metadata={"record": json.dumps(plain), "trial": json.dumps(asdict(trial))}))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sweep(trials, *, jobs=None, store=None, scheduler=None):
    """Run the trials that the store lacks, and return their records in the trials' order.

    jobs       worker processes; default DLM_JOBS or the number of cores.
    store      folder of finished records; default DLM_STORE or ".store" in the repository.
    scheduler  address of a Dask scheduler (tcp://…) to use instead of local processes; default SCHEDULER.

    Records are stored one by one as they finish, so that an interrupt loses only what is under way.
    """
    import joblib

    trials = list(trials)
    jobs = int(jobs or os.environ.get("DLM_JOBS") or os.cpu_count())
    check.at_least("jobs", jobs, 1)
    shelf = Store(store or os.environ.get("DLM_STORE") or REPOSITORY / ".store")
    records = {trial: shelf.get(trial) for trial in trials}
    missing = [trial for trial, record in records.items() if record is None]
    scheduler = scheduler or os.environ.get("SCHEDULER")
    master = None if scheduler else os.getpid()
    with (
        _progress(len(records), len(records) - len(missing)) as bar,
        engine(scheduler, jobs),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "A worker stopped")  # joblib replaces workers that have grown; no trial is lost
        parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        for trial, record in parallel(joblib.delayed(_numbered)(trial, master) for trial in missing):
            shelf.put(trial, record)
            records[trial] = record
            bar.update()
    return [records[trial] for trial in trials]


def table(trials, records):
    """A pandas DataFrame: one row per trial, the trial's fields (options spread out) and its record's numbers."""
    import pandas

    rows = []
    for trial, record in zip(trials, records, strict=True):
        row = {}
        for name, value in asdict(trial).items():
            row.update({f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value})
        rows.append({**row, **{name: value for name, value in record.items() if name != "arrays"}})
    return pandas.DataFrame(rows)


def summarise(frame, by):
    """Success, PSNR, SSIM and LPIPS per group of a table: one row per combination of the columns ``by``, in order of appearance.

    success_20 and success_30 are shares with their 95 % Wilson interval (low, high); psnr, ssim and lpips are medians, with
    the quartiles of psnr; released_20 is the share that the released code's PSNR of at least 20 would call a success.
    """
    import pandas
    from scipy.stats import binomtest

    rows = []
    for names, group in frame.groupby(by, sort=False, dropna=False):
        psnr = group["psnr"].fillna(float("-inf"))  # a trial without a picture is a failure, not a gap
        row = dict(zip(by, names)) | {"n": len(group)}
        for threshold in (20, 30):
            successes = int((psnr >= threshold).sum())
            interval = binomtest(successes, len(group)).proportion_ci(method="wilson")
            row |= {
                f"success_{threshold}": successes / len(group),
                f"low_{threshold}": interval.low,
                f"high_{threshold}": interval.high,
            }
        row |= {f"psnr_{q}": group["psnr"].quantile(q / 100) for q in (25, 50, 75)}
        row |= {name: group[name].astype(float).median() for name in ("ssim", "lpips", "released_psnr")}
        rows.append(
            row | {"released_20": (group["released_psnr"] >= 20).mean(), "labels_right": group["labels_right"].mean()}
        )
    return pandas.DataFrame(rows)


def _numbered(trial, master):
    if master not in (None, os.getpid()):
        end_with(master)
    return trial, trial.run()


@functools.cache
def end_with(master):
    """End this worker process when ``master``, which started it, is gone: joblib's outlive one that was killed."""

    def watch():
        while os.getppid() == master:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def engine(scheduler, jobs):
    """joblib's processes on this machine, or its Dask backend on the cluster behind ``scheduler``."""
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
            f"SCHEDULER {scheduler!r} cannot be reached within {PATIENCE} ({type(error).__name__}); "
            "give the tcp:// address of a running Dask scheduler, or leave it unset to use this machine"
        ) from None
    with client, joblib.parallel_config(backend="dask"):
        yield


@contextlib.contextmanager
def _progress(total, done):
    """A bar with the time left: in a reader's notebook or terminal, or, under ``make figures``, in the file it watches."""
    from tqdm.auto import tqdm

    watched = os.environ.get("DLM_PROGRESS")
    with contextlib.ExitStack() as stack:
        if watched:
            bar = stack.enter_context(_Watched(Path(watched), total, done))
        else:
            bar = stack.enter_context(tqdm(total=total, initial=done, unit="trial", file=sys.stderr, disable=done == total))
        yield bar


class _Watched:
    def __init__(self, path, total, done):
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
