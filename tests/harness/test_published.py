"""A notebook leaves the numbers of all its trials, and of no others, as one small file."""

import io
import json

import pandas

from dlm_core.harness import report, sweeps
from dlm_core.harness.trials import Trial, repeated

GREY = Trial(attack="grey", dataset="digits", model="mlp")


def test_a_report_publishes_the_trials_swept_since_it_began(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path))
    sweeps.sweep(repeated(GREY, 1), store=None, jobs=1)  # another's
    run = report.Report("77_mine", profile="smoke")
    plan = repeated(GREY, 3)
    records = sweeps.sweep(plan, store=None, jobs=1)
    sweeps.sweep(plan[:2], store=None, jobs=1)  # again: each trial has one row
    run.finish()
    name = "records/77_mine.csv.gz"
    content = (tmp_path / name).read_bytes()
    rows = pandas.read_csv(io.BytesIO(content), compression="gzip")
    assert rows["index"].tolist() == [0, 1, 2]
    assert all(abs(rows.psnr - [record["psnr"] for record in records]) < 1e-3)
    assert {"attack", "model", "client.learning_rate", "ssim", "seconds"} <= {*rows.columns}
    assert not any("arrays" in column for column in rows.columns)
    about = json.loads((tmp_path / "manifest.json").read_text())[name]
    assert about["notebook"] == "77_mine" and about["revision"]
    run.finish()
    assert (tmp_path / name).read_bytes() == content


def test_a_notebook_without_trials_publishes_none(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path))
    report.Report("78_mine", profile="smoke").finish()
    assert not (tmp_path / "records").exists()


class Own:
    """A user's trial, which is no dataclass."""

    key = "own"

    def run(self):
        return {"value": 1, "arrays": {}}


def test_a_trial_of_ones_own_kind_does_not_end_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path))
    run = report.Report("79_mine", profile="smoke")
    sweeps.sweep([Own()], store=None, jobs=1)
    run.finish()
    assert (tmp_path / "claims.json").exists()
