"""The user's commands, as a user runs them, and what they say when something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from safetensors.torch import save_file

from dlm_core import data, federated, models, records
from dlm_core.__main__ import main
from dlm_core.harness import audit, report
from dlm_core.harness.interrupts import kept_from_workers
from dlm_core.project import reproduce

REPOSITORY = Path(__file__).parents[2]


def command(*arguments, environment, **options):
    run = [sys.executable, "-m", "dlm_core", *map(str, arguments)]
    return subprocess.run(
        run, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600, **options
    )


NOTEBOOK = """
from dlm_core import data, evidence, report, sweeps, trials
run = report.Report("{name}", profile=profile, images=images)
client = trials.Client(learning_rate=0.05)
options = {{"max_evaluations": 5}}
plan = [
    trials.Trial("dlm_plus", options, "digits", index=i, client=client) for i in range(images)
]
table = sweeps.table(plan, sweeps.sweep(plan))
run.table(table[["index", "psnr", "loss"]], "a table")
{more}
ran = evidence.computed(len(table), "trials", quantity="count")
run.claim("it runs", ran.at_least(1), whose="ours")
run.finish()
"""


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Two tiny notebooks of which the first fails, in a folder of their own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    entries = []
    for name, more in {"90_breaks": "raise RuntimeError('on purpose')", "91_works": ""}.items():
        parameters = nbformat.v4.new_code_cell(
            "profile = 'quick'\nimages = 2", metadata={"tags": ["parameters"]}
        )
        cells = [parameters, nbformat.v4.new_code_cell(NOTEBOOK.format(name=name, more=more))]
        notebook = nbformat.v4.new_notebook(
            cells=cells,
            metadata={
                "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
            },
        )
        nbformat.write(notebook, folder / f"{name}.ipynb")
        entries.append(
            f'[{name}]\nset = "paper"\nsmoke = {{ images = 1 }}\n'
            "quick = { images = 2 }\npaper = { images = 3 }\n"
        )
    (folder / "profiles.toml").write_text("\n".join(entries))
    monkeypatch.setattr(reproduce, "NOTEBOOKS", folder)
    return folder


def test_a_failing_notebook_is_named_and_stops_no_other(notebooks, tmp_path, capsys):
    out = tmp_path / "out"
    assert reproduce.run("smoke", out=out, jobs=1) == ["90_breaks"]
    printed = capsys.readouterr().out
    assert (
        "90_breaks: FAILED" in printed
        and "RuntimeError: on purpose" in printed
        and "91_works: done" in printed
    )
    assert printed.rstrip().endswith("FAILED: 90_breaks") and "holds: it runs" in printed
    assert (out / "91_works.csv").read_text().count("\n") == 2
    executed = nbformat.read(out / "notebooks" / "91_works.ipynb", as_version=4)
    assert "images = 1" in "".join(cell.source for cell in executed.cells) and str(
        tmp_path
    ) not in json.dumps(executed)


def test_twice_the_same_table_and_a_manifest_that_tells(notebooks, tmp_path):
    reproduce.run("quick", only="91", out=tmp_path / "out", jobs=1)
    first = (tmp_path / "out" / "91_works.csv").read_bytes()
    shutil.rmtree(tmp_path / "store")
    reproduce.run("quick", only="91_works", out=tmp_path / "out", jobs=1)
    assert (tmp_path / "out" / "91_works.csv").read_bytes() == first
    entry = json.loads((tmp_path / "out" / "manifest.json").read_text())["91_works.csv"]
    assert (
        entry["notebook"] == "91_works"
        and entry["profile"] == "quick"
        and entry["parameters"]["images"] == 2
    )
    assert (
        entry["seconds"] > 0
        and entry["data"].keys() == set(data.NAMES)
        and torch.__version__.startswith(entry["versions"]["torch"])
    )
    assert entry["revision"] == report.revision()


def test_a_run_says_which_files_of_the_notebook_it_did_not_write(notebooks, tmp_path, capsys):
    out, notebook = tmp_path / "out", notebooks / "91_works.ipynb"
    reproduce.run("smoke", only="91", out=out)
    assert "earlier run" not in capsys.readouterr().out
    before = json.loads((out / "manifest.json").read_text())
    notebook.write_text(notebook.read_text().replace("run.table(", "print("))
    reproduce.run("quick", only="91", out=out, jobs=1)
    assert "left of an earlier run: 91_works.csv, 91_works.md\n" in capsys.readouterr().out
    after = json.loads((out / "manifest.json").read_text())
    assert after["91_works.csv"] == before["91_works.csv"]


def test_in_place_puts_the_executed_notebook_back(notebooks, tmp_path):
    reproduce.run("smoke", only="91", out=tmp_path / "out", in_place=True)
    cells = nbformat.read(notebooks / "91_works.ipynb", as_version=4).cells
    assert (
        all(cell.execution_count for cell in cells if cell.cell_type == "code")
        and cells[-1].outputs
    )


def test_one_parameter_instead_of_the_profile_s(notebooks, tmp_path):
    assert (
        reproduce.run("quick", only="91", parameters={"images": 4}, out=tmp_path / "out", jobs=1)
        == []
    )
    assert (tmp_path / "out" / "91_works.csv").read_text().count("\n") == 5


def test_a_run_writes_its_values_into_the_parameters_cell_and_adds_none(notebooks, tmp_path):
    out = tmp_path / "out"
    assert reproduce.run("smoke", only="91", parameters={"images": 3}, out=out, jobs=1) == []
    executed = nbformat.read(out / "notebooks" / "91_works.ipynb", as_version=4)
    assert len(executed.cells) == 2
    assert executed.cells[0].source == 'profile = "smoke"\nimages = 3'
    assert executed.cells[0].metadata.tags == ["parameters"]


def test_papermill_itself_takes_parameters_as_it_does(notebooks, tmp_path):
    import papermill

    target = tmp_path / "out.ipynb"
    (tmp_path / "figures").mkdir()
    papermill.execute_notebook(
        notebooks / "91_works.ipynb", target, {"images": 3}, progress_bar=False, log_output=False
    )
    assert (tmp_path / "figures" / "91_works.csv").read_text().count("\n") == 4


@pytest.mark.parametrize("profile", ["quick", "smoke"])
def test_the_kernel_is_our_own_whatever_the_user_has(notebooks, tmp_path, monkeypatch, profile):
    data_folder = tmp_path / "of the user"
    theirs = data_folder / "kernels" / "python3"
    theirs.mkdir(parents=True)
    about = {"argv": ["false"], "display_name": "theirs", "language": "python"}
    (theirs / "kernel.json").write_text(json.dumps(about))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(data_folder))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    monkeypatch.delenv("JUPYTER_PATH", raising=False)  # as `make test` sets it
    assert reproduce.run(profile, only="91", out=tmp_path / "out", jobs=1) == []
    assert "JUPYTER_PATH" not in os.environ


def test_lessons_run_on_it_too(tmp_path, monkeypatch):
    from dlm_core.project import lessons

    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    theirs = tmp_path / "kernels" / "python3"
    theirs.mkdir(parents=True)
    (theirs / "kernel.json").write_text('{"argv": ["false"], "display_name": "theirs"}')
    cell = nbformat.v4.new_code_cell("import sys; print(sys.executable)")
    about = {"kernelspec": {"name": "somebody_s", "display_name": "x", "language": "python"}}
    ran = lessons.run(nbformat.v4.new_notebook(cells=[cell], metadata=about))
    assert ran.cells[0].outputs[0].text.strip() == sys.executable


def test_the_readme_table_is_filled_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "NOTEBOOKS", tmp_path)
    cells = [nbformat.v4.new_markdown_cell("# It works\n\nand how")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "91_works.ipynb")
    fails = {
        "statement": "s",
        "whose": "released",
        "verdict": "does not hold",
        "evidence": "e",
        "cause": "c",
    }
    holds = {**fails, "statement": "h", "verdict": "holds", "cause": ""}
    undecided = {**fails, "statement": "u", "verdict": "undecided", "cause": ""}
    ours = {**fails, "statement": "o", "whose": "ours"}
    claims = {"91_works": {"profile": "smoke", "claims": [fails, holds, undecided, ours]}}
    (tmp_path / "claims.json").write_text(json.dumps(claims))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nstale\n<!-- /results -->\nafter\n")
    reproduce.fill_readme(tmp_path, readme)
    text = readme.read_text()
    assert "stale" not in text and text.startswith("before\n") and text.endswith("after\n")
    row = "| 91. [It works](notebooks/91_works.ipynb) "
    assert f"{row}| 1 of 3, 1 undecided | – | 0 of 1 | smoke |" in text
    assert "| 91. s | e | c |" in text
    assert not any(f"| 91. {other} |" in text for other in "huo")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["figures", "--profile", "quik"],
            "PROFILE 'quik' is unknown: choose from smoke, quick, paper; did you mean quick?",
        ),
        (["figures", "--only", "01_attack_compared"], "notebook '01_attack_compared' is unknown"),
        (["figures", "--only", "77"], "notebook '77' is unknown"),
        (["figures", "--set", "papers"], "SET 'papers' is unknown"),
        (
            ["figures", "--only", "03", "--parameter", "seed=100"],
            "parameter of 03_dlg_needs_the_learning_rate 'seed' is unknown",
        ),
        (
            ["figures", "--only", "03", "--parameter", "seeds=2 images=many"],
            "parameter images of 03_dlg_needs_the_learning_rate is 'many'; it takes a whole number",
        ),
        (["figures", "--parameter", "seeds"], "--parameter is 'seeds'; it takes NAME=VALUE"),
        (["figures", "--parameter", "seeds=1 seeds=2"], "--parameter seeds is given twice"),
        (["attack", "a"], "attack takes two files"),
        (["figures", "--jobs", "0"], "JOBS is 0; it takes a whole number in [1, 4096]"),
        (
            ["attack", "absent.safetensors", "absent.pt"],
            "snapshot 'absent.safetensors' does not exist",
        ),
        (["attack", "a", "b", "--model", "lennet"], "model 'lennet' is unknown"),
        (["attack", "a", "b", "--attack", "dlm_pluss"], "attack 'dlm_pluss' is unknown"),
        (["attack", "a", "b", "--image-shape", "32"], "image_shape is"),
        (["bench", "--images", "21"], "n is 21"),
        (["bench", "--peer-images", "-1"], "peer_images is -1"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, message, capsys):
    """Which names the argument; that nothing else is said or done, test_wrong_commands sees to."""
    assert main(arguments) == (64 if arguments[0] == "attack" else 2)  # 2 is a verdict there
    assert message in capsys.readouterr().err


def test_an_interrupt_says_what_is_kept_and_nothing_else(tmp_path, environment):
    run = [
        sys.executable,
        "-m",
        "dlm_core",
        "figures",
        "--only",
        "03",
        "--out",
        str(tmp_path / "out"),
    ]
    where = {"cwd": REPOSITORY, "env": {**environment, "DLM_STORE": str(tmp_path / "store")}}
    process = subprocess.Popen(
        run, **where, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.time() + 120
    while not list((tmp_path / "store").rglob("*.safetensors")) and time.time() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of its processes
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and list((tmp_path / "store").rglob("*.safetensors"))
    assert said.rstrip().endswith("the same command goes on from here") and "Traceback" not in said


def test_workers_are_deaf_to_an_interrupt_from_their_first_instruction():
    with kept_from_workers():
        ask = "import signal, os; os.kill(os.getpid(), signal.SIGINT); print('alive')"
        worker = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert worker.stdout == "alive\n" and worker.stderr == ""
    kept = False
    with pytest.raises(KeyboardInterrupt), kept_from_workers():
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        kept = True
    assert kept, "it is delivered on leaving"


WORKER = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from dlm_core.harness.interrupts import ended_with_us, kept_from_workers

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, ended_with_us():
        with kept_from_workers():
            pool.submit(print, "begun", flush=True).result()
            task = pool.submit(time.sleep, 600)
        task.result()
"""


def test_an_interrupt_ends_workers_that_are_deaf_to_it(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "worker.py"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "begun\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert workers and not psutil.wait_procs(workers, timeout=15)[1]


@pytest.mark.parametrize(
    "abbreviated, status", [(["figures", "--prof", "quick"], 2), (["attack", "--mod", "mlp"], 64)]
)
def test_options_are_not_abbreviated(abbreviated, status, environment):
    done = command(*abbreviated, environment=environment)
    assert done.returncode == status and "unrecognized arguments" in done.stderr


def test_the_program_is_named_as_it_was_called(environment, capsys, monkeypatch):
    assert "usage: python -m dlm_core" in command("--help", environment=environment).stdout
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/dlm", "--help"])
    with pytest.raises(SystemExit):
        main(["figures", "--help"])
    assert capsys.readouterr().out.startswith("usage: dlm figures")


def test_former_names_of_options_still_serve(environment):
    for option in ("--images", "--num-images"):
        done = command("attack", "a", "b", option, "0", environment=environment)
        assert done.returncode == 64 and "num_images is 0" in done.stderr


def test_an_unwritable_output_folder_is_said_first(tmp_path, environment):
    (tmp_path / "file").write_text("")
    done = command(
        "figures", "--profile", "smoke", "--out", tmp_path / "file", environment=environment
    )
    assert done.returncode == 2 and "cannot be written" in done.stderr and "OUT" in done.stderr


def test_an_unreachable_scheduler_is_said_first(environment, tmp_path):
    done = command(
        "figures",
        "--scheduler",
        "tcp://127.0.0.1:9",
        "--out",
        tmp_path / "out",
        environment=environment,
    )
    assert done.returncode == 2 and "SCHEDULER 'tcp://127.0.0.1:9' cannot be reached" in done.stderr


def test_every_command_has_help(environment):
    for name in ("env", "figures", "verify", "test", "lab", "bench", "clean", "attack"):
        done = command(name, "--help", environment=environment)
        assert done.returncode == 0 and f"dlm_core {name}" in done.stdout


def test_what_can_be_named_is_listed_from_the_records(environment):
    done = command("attack", "--list", environment=environment)
    assert done.returncode == 0
    assert all(name in done.stdout for name in (*audit.tried(), *records.NETWORKS))
    assert all(name in done.stdout for name in records.CLIENT_OPTIMIZERS)


def test_attack_on_two_files_of_one_s_own(tmp_path, environment):
    images, labels, *_ = data.load("digits", n=1)
    seen = federated.train_locally(
        models.build("lenet", (1, 8, 8), 10, seed=5), images, labels, lr=0.05
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in seen.model.state_dict().items()},
        tmp_path / "before.safetensors",
    )
    torch.save(seen.weights_after, tmp_path / "after.pt")
    where = ["--image-shape", "1,8,8", "--out", tmp_path / "found.png"]
    done = command(
        "attack",
        tmp_path / "before.safetensors",
        tmp_path / "after.pt",
        *where,
        environment=environment,
    )
    assert done.returncode == 1, done.stderr
    assert (
        "one step of sgd on one image, learning rate 0.05" in done.stdout
        and "has leaked" in done.stdout
    )
    assert (
        f"labels {labels.tolist()}" in done.stdout and (tmp_path / "found.png").stat().st_size > 0
    )
    assert (
        "dlm_plus" not in done.stdout and "others to try" not in done.stdout
    )  # exact recovery came first, and was enough
    done = command(
        "attack", tmp_path / "after.pt", tmp_path / "after.pt", *where, environment=environment
    )
    assert done.returncode == 0 and "has not trained" in done.stdout


def test_a_python_without_the_packages_is_told_in_one_line():
    run = [sys.executable, "-S", "-m", "dlm_core", "attack", "a", "b"]  # -S: without site-packages
    done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)
    assert (
        done.returncode == 64
        and done.stderr.startswith("error: torch is not installed")
        and "make env" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


def test_make_alone_prints_what_there_is():
    printed = subprocess.run(
        ["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert all(
        f"make {target}" in printed
        for target in ("figures", "verify", "test", "lab", "bench", "clean", "env")
    )
