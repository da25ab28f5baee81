"""What notebooks ask of their tables, and the sentence that says in which setting they hold."""

import math

import pandas
import pytest
import torch

from dlm_core.harness import report, settings, tables
from dlm_core.harness.trials import Trial, repeated

FRAME = pandas.DataFrame(
    {
        "attack": ["dlm_plus", "dlm_plus", "grey"],
        "client.local_steps": [1, 2, 1],
        "psnr": [25.0, float("nan"), 12.0],
    }
)


def test_rows_are_chosen_by_name():
    assert len(tables.where(FRAME, attack="dlm_plus")) == 2
    assert len(tables.where(FRAME, attack=["dlm_plus", "grey"], client__local_steps=1)) == 2
    assert tables.only(FRAME, attack="grey").psnr == 12.0
    for many in ({"attack": "dlm_plus"}, {"attack": "dlm"}):
        with pytest.raises(ValueError, match="takes exactly one"):
            tables.only(FRAME, **many)


def test_a_trial_without_a_picture_is_a_failure():
    both = tables.where(FRAME, attack="dlm_plus")
    assert tables.success(both) == 0.5
    assert tables.said(both).startswith("50% of 2 at 20 dB, median ")


def test_an_interval_is_student_s():
    mean, low, high = tables.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and high - mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert low == pytest.approx(2 * mean - high)
    assert all(math.isnan(limit) for limit in tables.interval([1.0])[1:])


def test_rms_is_over_all_entries():
    assert tables.rms([torch.tensor([3.0]), torch.tensor([[4.0, 0.0]])]) == pytest.approx(
        5 / math.sqrt(3)
    )


def test_the_setting_is_said_from_the_trials():
    base = Trial(client={"learning_rate": 0.01})
    said = settings.sentence([*repeated(base, 3), *repeated(Trial("grey"), 3)])
    assert said.startswith("Setting: LeNet with the paper's weights, ")
    assert "one image, one step of SGD at 0.01, float32, label inferred, our search" in said
    assert said.endswith("n = 3 images, 3 networks, 3 attacks.")
    defended = Trial(
        attack_options={"labels": "given", "optimizer": "released_lbfgs"},
        client={"local_steps": 5, "client_optimizer": "adam", "transmitted": "float16"},
        defence={"name": "noise", "scale": 1e-3},
        num_images=2,
    )
    said = settings.sentence([defended])
    assert "2 images, 5 steps of Adam" in said and "float16" in said
    assert "defended by noise (released)" in said and "label told" in said
    assert settings.sentence([], n="no attack") == "Setting: n = no attack."


def test_equal_images_and_networks_are_counted_once():
    trials = [Trial(attack_options={"max_evaluations": n}) for n in (1, 2, 3)]
    assert settings.sentence(trials).endswith("n = 1 image, 1 network, 3 attacks.")


def test_a_report_reads_its_parameters_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path))
    values = {"profile": "mine", "images": 7, "learning_rate": 0.1}
    code = "from dlm_core.harness import report; run = report.start('00_quickstart')"
    exec(code, values)
    run = values["run"]
    assert run.notebook == "00_quickstart" and run.parameters["images"] == 7
    with pytest.raises(
        ValueError, match="notebook '00_quickstrt' is unknown.*did you mean 00_quickstart"
    ):
        report.start("00_quickstrt")


def test_who_knows_what_is_read_off_the_records():
    from dlm_core.harness import trials

    seen, *_ = trials.observe(Trial(dataset="digits"))
    shown = report.knowledge(seen, ["dlm_plus", "dlg", "inverting_gradients"]).data
    knows = dict(zip(shown["who"], shown["knows"]))
    assert knows["DLM+"] == "nothing more"
    assert "learning rate" in knows["DLG"] and "total-variation" in knows["IG"]
    with pytest.raises(ValueError, match="attack 'dlgg' is unknown.*did you mean dlg"):
        report.knowledge(seen, ["dlgg"])


def test_trials_are_said_in_words_and_none_as_not_run():
    frame = pandas.DataFrame({"psnr": [10.0, 25.0, math.nan, 30.0]})
    assert tables.said(frame) == "50% of 4 at 20 dB, median 17.5 dB"
    assert tables.said(frame[frame.psnr > 40]) == "not run"


def test_per_image_gives_each_image_of_a_batch_its_row():
    trials = pandas.DataFrame(
        {"index": [0, 2], "psnr": [15.0, 30.0], "psnrs": [[10.0, 20.0], [30.0]]}
    )
    images = tables.per_image(trials)
    assert images["index"].tolist() == [0, 0, 2]
    assert images.psnr.tolist() == [10.0, 20.0, 30.0] and images.psnr.dtype == float
    assert "psnrs" not in images and "psnrs" in trials


def test_numbers_texts_and_spreads_are_said_briefly():
    assert tables.brief([0.03, math.nan, 0.123456]) == ["0.03", "", "0.123456"]
    assert tables.brief([0.123456], 2) == ["0.12"]
    assert tables.listed(["a", "b"]) == "a; b" and tables.listed([]) == "none"
    assert tables.spread(pandas.Series([40.0, 42.0])) == "41.0 ± 1.4 dB (n 2)"
    assert tables.spread(pandas.Series([40.0])) == "40.0 dB (n 1)"
    assert tables.spread(pandas.Series([], dtype=float)) == "not run"
