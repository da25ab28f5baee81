"""A real federation of Flower on this machine: a SuperLink, SuperNodes and ``flwr run``, each a
process of its own, on free ports of the loopback interface.

    python -m dlm_core.harness.federation PLAN.json

is the keeper: it starts them all, and ends them all when its standard input ends, which it does
when whoever started it is gone, killed as well.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm_core import check
from dlm_core.harness.paths import REPOSITORY, probe

HOST = "127.0.0.1"
NAME = "here"  # of the SuperLink, in Flower's own settings
LOGS = "logs"
# Neither of Flower's calls home: statistics, and the question for a newer version.
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: what outlives its parent becomes ours
STARTED = 600  # seconds for them to listen: two on a free core, minutes beside others


@check.arguments
def run(
    python: str | Path,
    app: str | Path,
    folder: str | Path,
    *,
    num_clients: check.Count = 4,
    settings: Mapping[str, Any] | None = None,
    minutes: check.Positive = 10.0,
) -> Path:
    """Run a Flower app from beginning to end.

    Parameters
    ----------
    python
        Of an environment with Flower.
    app
        The app's folder, with its pyproject.toml.
    folder
        For all that is written: logs, Flower's own files, and ``kept``, whose path the app is told
        under this name.
    num_clients
        SuperNodes; the n-th is told ``partition-id`` n-1.
    settings
        Others of the app's run config: numbers and texts.
    minutes
        That the run may take, above 0.

    Returns
    -------
    Path
        Of ``kept``.

    Raises
    ------
    ValueError
        Where the folder cannot be written or has such a run in it.
    ChildProcessError
        Where the run failed or took too long, with the folder of its logs.
    """
    folder = Path(folder).resolve()
    kept = folder / "kept"
    if kept.exists():
        raise ValueError(f"folder {str(folder)!r} has a federation's run in it; take another")
    for each in (folder, kept, folder / LOGS, folder / "tmp", folder / "flower"):
        try:
            probe(each)
        except OSError as error:
            refused = f"folder {str(folder)!r} cannot be written ({error.strerror})"
            raise ValueError(refused) from None
    plan = _plan(Path(python), Path(app).resolve(), folder, num_clients, dict(settings or {}))
    path = folder / "plan.json"
    path.write_text(json.dumps(plan, indent=1))
    keeper = subprocess.Popen(
        [sys.executable, "-m", "dlm_core.harness.federation", str(path)],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,  # an interrupt is ours to answer: the keeper's input ends
    )
    try:
        status: int | None = keeper.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait()
    if status != 0:
        why = f"took more than {minutes:g} minutes" if status is None else "failed"
        raise ChildProcessError(f"the federation {why}; its logs are in {folder / LOGS}")
    return kept


def _plan(
    python: Path, app: Path, folder: Path, num_clients: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """What the keeper starts, and in which environment."""
    port, *others = _free_ports(1 + num_clients)
    link, home = f"{HOST}:{port}", folder / "flower"
    connection = f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "{link}"\n'
    (home / "config.toml").write_text(f"{connection}insecure = true\n")
    told = {"kept": str(folder / "kept"), **settings}
    chosen = " ".join(f"{name}={json.dumps(value)}" for name, value in told.items())
    here = python.parent
    nodes = [
        [
            *(str(here / "flower-supernode"), "--insecure", "--superlink", link),
            *("--host", HOST, "--port", str(other)),
            *("--node-config", f"partition-id={n} num-partitions={num_clients}"),
        ]
        for n, other in enumerate(others)
    ]
    server = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
    return {
        "ports": [port, *others],
        "logs": str(folder / LOGS),
        "superlink": [str(here / server[0]), *server[1:], "--host", HOST, "--port", str(port)],
        "supernodes": nodes,
        "run": [str(here / "flwr"), "run", str(app), NAME, "--stream", "--run-config", chosen],
        "environment": {
            **QUIET,
            "FLWR_HOME": str(home),
            "TMPDIR": str(folder / "tmp"),
            "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(REPOSITORY),
            "NO_PROXY": HOST,
            "no_proxy": HOST,
            "OMP_NUM_THREADS": "1",
        },
    }


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listened on just now, all different."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


# --- the keeper


def keep(path: str) -> int:
    """Start what a plan names, and wait for its run; the run's exit status, 1 where our own parent
    ended first.
    """
    plan = json.loads(Path(path).read_text())
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    try:
        _start(plan, "superlink", plan["superlink"])
        if not _listen(plan["ports"][:1]):
            return 1
        for n, command in enumerate(plan["supernodes"]):
            _start(plan, f"supernode-{n}", command)
        # On a busy machine a ServerApp beside starting SuperNodes can miss its own deadline.
        if not _listen(plan["ports"][1:]):
            return 1
        run = _start(plan, "run", plan["run"])
        while run.poll() is None:
            if _orphaned(0.2):
                return 1
        return run.returncode
    finally:
        _end_all()


def _start(plan: Mapping[str, Any], name: str, command: list[str]) -> subprocess.Popen[bytes]:
    with open(Path(plan["logs"], f"{name}.log"), "wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **plan["environment"]},
        )


def _listen(ports: list[int]) -> bool:
    """Whether there came to be listeners at all of them, before our parent ended."""
    waiting, end = list(ports), time.monotonic() + STARTED
    while waiting and time.monotonic() < end and not _orphaned(0.2):
        try:
            socket.create_connection((HOST, waiting[0]), timeout=1).close()
            waiting.pop(0)
        except OSError:
            continue
    return not waiting


def _orphaned(seconds: float) -> bool:
    """Whether our input ended, within these seconds at most."""
    ready = select.select([sys.stdin], [], [], seconds)[0]
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


def _end_all() -> None:
    """Kill all that descends from us, those too that left their parent."""
    import psutil

    me = psutil.Process()
    while descendants := me.children(recursive=True):
        for each in descendants:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(descendants, timeout=5)


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1]))
