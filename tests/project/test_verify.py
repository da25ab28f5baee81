"""The results again: what a verification runs, what it compares with, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from dlm_core.__main__ import main
from dlm_core.project import reproduce, verify

REPOSITORY = Path(__file__).parents[2]
TABLE = "attack,n,psnr_50\ndlm_plus,4,41.7116\n"
MACHINE = {"processor": "one", "cores": 2, "blas": "mkl", "threads": 1, "versions": {"torch": "2"}}


def write(folder, table=TABLE, verdict="holds", profile="quick", **machine):
    folder.mkdir(exist_ok=True)
    claim = {"statement": "It works", "verdict": verdict, "evidence": "41.7 dB", "cause": ""}
    claims = {"00_quickstart": {"profile": profile, "claims": [claim]}}
    about = {"notebook": "00_quickstart", **MACHINE, **machine}
    (folder / "00_quickstart.csv").write_text(table)
    (folder / "claims.json").write_text(json.dumps(claims))
    (folder / "manifest.json").write_text(json.dumps({"00_quickstart.csv": about}))
    return folder


def compared(reference, now):
    """(exit status, output) of the command, which runs nothing."""
    where = ["--no-run", "--only", "00", "--against", reference, "--out", now]
    run = [sys.executable, "-m", "dlm_core", "verify", *map(str, where)]
    done = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_exit_status_says_whether_all_is_the_same(tmp_path):
    reference, now = write(tmp_path / "reference"), tmp_path / "now"
    status, said = compared(reference, write(now))
    assert status == 0 and "00_quickstart: the same, all 8 values\n1 the same\n" in said
    assert "reference: one, 2 cores, 1 threads; mkl; revision unknown; torch 2 (00)" in said
    status, said = compared(reference, write(now, TABLE.replace("41.7116", "41.7216")))
    assert status == 1 and "DIFFERENT on the same machine, 1 of 8 values" in said
    assert "00_quickstart.csv, row 1 (attack dlm_plus), psnr_50: 41.7116 in the" in said
    status, said = compared(reference, write(now, profile="paper"))
    assert status == 2 and said.startswith("error: OUT is") and "'paper' and not 'quick'" in said


def test_another_machine_has_tolerances_and_verdicts_have_none(tmp_path, capsys):
    reference, now = write(tmp_path / "reference"), tmp_path / "now"
    near = write(now, TABLE.replace("41.7116", "41.7216"), processor="another")
    line = ["verify", "--no-run", "--only", "00", "--against", str(reference), "--out", str(near)]
    assert main(line) == 0 and "00_quickstart: within tolerance, 1 of 8" in capsys.readouterr().out
    write(now, TABLE.replace("41.7116", "41.7216"), device="cuda one card")
    assert main(line) == 0
    assert "mkl; trials on cuda one card; revision" in capsys.readouterr().out
    write(now, verdict="does not hold", processor="another")
    assert main(line) == 1
    said = capsys.readouterr().out
    assert "on another machine (processor)" in said
    assert (
        "claims.json, row 1 (It works), verdict: holds in the reference, does not hold now" in said
    )


def test_what_is_not_recorded_is_not_the_same_machine():
    assert verify.unlike(MACHINE, MACHINE) == []
    assert verify.unlike({}, MACHINE) == verify.unlike(MACHINE, {}) == list(verify.MACHINE)
    assert verify.unlike({}, {}) == list(verify.MACHINE)
    assert verify.unlike({**MACHINE, "cores": 64}, MACHINE) == []  # they change no digit
    assert verify.unlike(MACHINE, {**MACHINE, "versions": {"torch": "3"}}) == ["versions"]
    on_card = {**MACHINE, "device": "cuda one card"}
    assert verify.unlike(MACHINE, on_card) == verify.unlike(on_card, MACHINE) == ["device"]
    assert verify.unlike(on_card, on_card) == []


CELL = """
import os
from pathlib import Path
from dlm_core import evidence, report, sweeps, trials
run = report.Report("{name}", profile=profile, images=images)
client = trials.Client(learning_rate=0.05)
plan = [trials.Trial("dlm_plus", {{"max_evaluations": 5}}, "digits", index=i, client=client)
        for i in range(images)]
finished = len(list(Path(os.environ["DLM_STORE"]).rglob("*.safetensors")))
table = sweeps.table(plan, sweeps.sweep(plan))
{more}
run.table(table[["index", "psnr", "loss"]], "a table")
before = evidence.computed(finished, "trials finished", quantity="count")
run.claim("No trial was finished before", before.at_most(0), whose="ours")
run.finish()
"""
BREAKS = 'if Path("{flag}").exists(): raise RuntimeError("on purpose")'


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Two tiny notebooks, of which the first fails as long as the file that is returned exists."""
    folder, flag = tmp_path / "notebooks", tmp_path / "breaks"
    folder.mkdir()
    entries = ""
    for name, more in {"90_may_break": BREAKS.format(flag=flag), "91_works": ""}.items():
        first = nbformat.v4.new_code_cell(
            "profile = 'quick'\nimages = 1", metadata={"tags": ["parameters"]}
        )
        cell = nbformat.v4.new_code_cell(CELL.format(name=name, more=more))
        nbformat.write(nbformat.v4.new_notebook(cells=[first, cell]), folder / f"{name}.ipynb")
        entries += f'[{name}]\nset = "paper"\nsmoke = {{ images = 1 }}\nquick = {{ images = 1 }}\n'
    (folder / "profiles.toml").write_text(entries)
    monkeypatch.setattr(reproduce, "NOTEBOOKS", folder)
    monkeypatch.setattr(verify, "BUILD", tmp_path / "build")
    return flag


def test_a_failing_notebook_is_reported_and_the_others_are_compared(notebooks, tmp_path, capsys):
    notebooks.touch()
    assert main(["verify", "--profile", "smoke"]) == 1
    said = capsys.readouterr().out
    assert "is kept as the reference" in said and "FAILED, and not compared: 90_may_break" in said
    kept = tmp_path / "build" / "smoke" / "reference"
    assert list(json.loads((kept / "claims.json").read_text())) == ["91_works"]
    assert (kept / verify.STORE).is_dir(), "what it has finished is not lost"
    assert main(["verify", "--profile", "smoke"]) == 1
    said = capsys.readouterr().out
    assert "goes on from an interrupted one" in said and "91_works: the same" in said
    notebooks.unlink()
    assert main(["verify", "--profile", "smoke", "--only", "90"]) == 0
    assert not (kept / verify.STORE).exists()


def test_no_stored_trial_serves_and_no_table_of_before(notebooks, tmp_path, capsys):
    (tmp_path / "store").mkdir()
    line, folders = ["verify", "--only", "91", "--jobs", "1"], ("reference", "now")
    assert main(line) == 0 and main(line) == 0
    assert "91_works: the same" in capsys.readouterr().out
    for name in folders:  # as one that a notebook no longer writes
        (tmp_path / "build" / "quick" / name / "91_works_more.csv").write_text("a\n1\n")
    assert main(line) == 1
    assert "91_works_more.csv: there in the reference, missing now" in capsys.readouterr().out
    for name in folders:
        claims = json.loads((tmp_path / "build" / "quick" / name / "claims.json").read_text())
        assert claims["91_works"]["claims"][0]["verdict"] == "holds"
    assert not list((tmp_path / "store").iterdir()), "the user's own is left alone"


def test_a_real_notebook_comes_out_again_and_one_number_altered_is_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(verify, "BUILD", tmp_path)
    line = ["verify", "--profile", "smoke", "--only", "00"]
    assert main(line) == 0 and main(line) == 0
    assert "00_quickstart: the same" in capsys.readouterr().out
    table = tmp_path / "smoke" / "reference" / "00_quickstart.csv"
    head, first, *rest = table.read_text().splitlines()
    cells = dict(zip(head.split(","), first.split(",")))
    cells["psnr_50"] = f"{float(cells['psnr_50']) + 0.001:.6g}"
    table.write_text("\n".join([head, ",".join(cells.values()), *rest]) + "\n")
    assert main([*line, "--no-run"]) == 1
    said = capsys.readouterr().out
    assert "00_quickstart.csv, row 1 (attack dlm_plus), psnr_50: " + cells["psnr_50"] in said
    assert os.environ["DLM_STORE"] and not (tmp_path / "smoke" / "now" / verify.STORE).exists()
