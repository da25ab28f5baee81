"""A real federation of Flower on this machine, and the audit of all that its server kept:
``make flower``.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dlm_core.harness import federation, kept
from dlm_core.harness.paths import checkout

APP = Path("examples", "flower")
# {smoke: (run config, minutes for all audits)}
SIZES = {True: ({"num-rounds": 1, "many": 100}, 0.5), False: ({"num-rounds": 3}, 5.0)}
# Clients of the app that leak by design: one image, one step.
PLANTED = (0, 1)


def strategies(python: Path) -> int:
    """Run the wrapper's tests with Flower's own strategies; pytest's exit status."""
    repository = checkout("flower")
    settings = {**os.environ, **federation.QUIET, "PYTHONPATH": str(repository)}
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no")
    here = repository / "tests" / "harness"
    files = (here / "with_flower.py", here / "with_secagg.py")
    return subprocess.run([python, *tests, *files], cwd=repository, env=settings).returncode


def run(python: Path, *, smoke: bool, minutes: float = 10.0) -> bool:
    """Run the federation and audit it; whether the planted leaks were found, and no other client's
    images were said to leak.

    Parameters
    ----------
    python
        Of Flower's environment.
    smoke
        One round and few images, instead of three rounds.
    minutes
        That the training may take.
    """
    repository = checkout("flower")
    folder = repository / "build" / "flower"
    shutil.rmtree(folder, ignore_errors=True)
    settings, budget = SIZES[smoke]
    began = time.monotonic()
    where = federation.run(python, repository / APP, folder, settings=settings, minutes=minutes)
    seconds = time.monotonic() - began
    result = where / "federation.json"
    if not result.exists():
        raise ChildProcessError(
            f"the federation failed; its logs are in {folder / federation.LOGS} (Flower gives up "
            "on a process that needs more than 30 s to start, as on a machine that is busy)"
        )
    accuracy = json.loads(result.read_text())["accuracy"]
    rounds = ", ".join(f"{each:.0%}" for each in accuracy)
    print(f"the federation ran for {seconds:.0f} s; accuracy before and after each round: {rounds}")
    sys.path.insert(0, str(repository / APP))
    task = importlib.import_module("quickstart.task")
    asked = {"model": task.Net(), "image_shape": task.SHAPE, "normalise": task.NORMALISE}
    pairs = sorted(kept.read(where), key=lambda pair: (pair.number, pair.said["partition-id"]))
    done = kept.audits(pairs, minutes=budget, asked=asked)
    print("", *(f"client {n}: {what}" for n, what in enumerate(task.CLIENTS)), sep="\n")
    wrong = unexpected(done)
    print(*wrong, sep="\n")
    return not wrong


def unexpected(done: Sequence[kept.Audited]) -> list[str]:
    """What the audits of the app's clients should have said otherwise, in sentences: of a planted
    leak that an image, or what a layer made of it, leaked; of no other client that.

    Parameters
    ----------
    done
        As ``kept.audits`` returns them, of clients that told their ``partition-id``.
    """
    said = []
    for each in done:
        leaks = each.found.leaks if each.found is not None else []
        shown = [leak for leak in leaks if leak.what.startswith(("image", "input of layer"))]
        planted = each.pair.said["partition-id"] in PLANTED
        if planted and not shown:
            said.append(f"{each.pair} leaks, and the audit says: {each.verdict}")
        if not planted and shown:
            said.append(f"{each.pair} has many images, and the audit says: {shown[0]}")
    return said
