"""The processes of a federation: on loopback, in one folder, and gone when their starter is. Small
programs stand for Flower's.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dlm_core.harness import federation
from dlm_core.project import flower_environment

REPOSITORY = Path(__file__).parents[2]
LISTENING = """
import socket, subprocess, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
host = sys.argv[sys.argv.index("--host") + 1]
listener = socket.create_server((host, port))
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)", sys.argv[0]]
subprocess.Popen(sleep, start_new_session=True)  # as Flower's SuperExec leaves its parent
while True:
    time.sleep(1)
"""
RUNNING = """
import json, os, sys, time
told = dict(each.split("=", 1) for each in sys.argv[sys.argv.index("--run-config") + 1].split())
print("the app has run", flush=True)
with open(os.path.join(json.loads(told["kept"]), "seen.json"), "w") as file:
    json.dump({"told": told, "environment": dict(os.environ), "pid": os.getppid()}, file)
time.sleep(float(told["sleeps"]))
sys.exit(int(told["fails"]))
"""


@pytest.fixture
def python(tmp_path):
    """The Python of an environment with programs of Flower's names."""
    here = tmp_path / "bin"
    here.mkdir()
    programs = {"flower-superlink": LISTENING, "flower-supernode": LISTENING, "flwr": RUNNING}
    for name, text in programs.items():
        (here / name).write_text(f"#!{here}/python -S\n{text}")
        (here / name).chmod(0o755)
    (here / "python").symlink_to(sys.executable)
    return here / "python"


def run(python, folder, sleeps=0, fails=0, **options):
    settings = {"sleeps": sleeps, "fails": fails}
    return federation.run(python, folder, folder, num_clients=2, settings=settings, **options)


def test_a_run_ends_and_leaves_no_process(python, tmp_path):
    kept = run(python, tmp_path / "run")
    seen = json.loads((kept / "seen.json").read_text())
    assert seen["environment"]["FLWR_TELEMETRY_ENABLED"] == "0"
    inside = [seen["environment"][name] for name in ("FLWR_HOME", "TMPDIR")]
    assert all(Path(each).is_relative_to(tmp_path / "run") for each in inside)
    assert "the app has run" in (tmp_path / "run" / "logs" / "run.log").read_text()
    assert not [p for p in psutil.process_iter() if ours(p, tmp_path)]
    with pytest.raises(ValueError, match="has a federation's run in it; take another"):
        run(python, tmp_path / "run")


def ours(process, folder):
    try:
        return str(folder) in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def test_only_loopback_and_free_ports_are_planned(python, tmp_path):
    run(python, tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert len(set(plan["ports"])) == 3
    for command, port in zip([plan["superlink"], *plan["supernodes"]], plan["ports"]):
        assert command[command.index("--host") + 1] == "127.0.0.1"
        assert command[command.index("--port") + 1] == str(port)
    assert all(f"127.0.0.1:{plan['ports'][0]}" in each for each in plan["supernodes"])


@pytest.mark.parametrize(
    "sleeps, fails, minutes, message",
    [(0, 3, 5, "the federation failed"), (600, 0, 0.15, "took more than 0.15 minutes")],
)
def test_what_fails_or_takes_too_long_is_said_with_the_place_of_its_logs(
    sleeps, fails, minutes, message, python, tmp_path
):
    with pytest.raises(ChildProcessError, match=message) as said:
        run(python, tmp_path / "run", sleeps, fails, minutes=minutes)
    assert str(said.value).endswith(f"its logs are in {tmp_path / 'run' / 'logs'}")
    assert len(str(said.value).splitlines()) == 1
    assert not [p for p in psutil.process_iter() if ours(p, tmp_path)]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_all_processes_end_with_whoever_started_them(by, python, tmp_path):
    starter = started(python, ".", tmp_path / "run", {"sleeps": 600, "fails": 0})
    seen = tmp_path / "run" / "kept" / "seen.json"
    patiently(lambda: seen.exists() and seen.read_text())
    keeper = psutil.Process(json.loads(seen.read_text())["pid"])
    family = [keeper, *keeper.children(recursive=True)]
    assert len(family) >= 5, "the SuperLink, two SuperNodes, the run"
    starter.send_signal(by)
    starter.wait(60)
    assert not psutil.wait_procs(family, timeout=60)[1]
    patiently(lambda: not [p for p in psutil.process_iter() if ours(p, tmp_path)])


def started(python, app, folder, settings):
    """A process of its own that runs a federation."""
    told = f"{str(python)!r}, {str(app)!r}, {str(folder)!r}, num_clients=2, settings={settings}"
    script = f"from dlm_core.harness import federation; federation.run({told})"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_flower_s_own_processes_end_with_a_killed_starter(tmp_path):
    """Under Flower's environment, if it was made: `make flower` makes it."""
    python = flower_environment.made()
    if python is None:
        pytest.skip("Flower's environment is not made; `make flower` makes it and runs this")
    starter = started(python, REPOSITORY / "examples" / "flower", tmp_path / "run", {"many": 20})
    log = tmp_path / "run" / "logs" / "run.log"
    patiently(lambda: log.exists() and log.read_text(), seconds=600)
    assert len(of_flower(tmp_path)) >= 4, "the SuperLink, two SuperNodes, the run"
    starter.kill()
    starter.wait(60)
    patiently(lambda: not of_flower(tmp_path))


def of_flower(folder):
    """The processes whose Flower has its home in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME", "").startswith(str(folder)):
                found.append(process)
    return found


def patiently(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    "options, message",
    [({"minutes": 0}, "minutes is 0"), ({"num_clients": 0}, "num_clients is 0")],
)
def test_wrong_arguments_end_in_one_sentence(options, message, tmp_path):
    given = {"python": "p", "app": "a", "folder": tmp_path, **options}
    with pytest.raises(ValueError, match=message):
        federation.run(**given)
