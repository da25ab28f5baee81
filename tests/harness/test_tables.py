"""What notebooks ask of their tables, and the sentence that says in which setting they hold."""

import math
import subprocess
import sys
from pathlib import Path

import numpy
import pandas
import pytest
import torch

from dlm_core.harness import evidence, report, settings, sweeps, tables
from dlm_core.harness.trials import Trial, repeated

RECORDS = Path(__file__).parents[2] / "figures" / "records"

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
    assert tables.said(both) == "50% of 2 at 20 dB, median without a picture"


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
    clip = {"name": "clip_and_noise", "clip": 0.1}
    assert "defended by clipping, " in settings.sentence([Trial(defence=clip)])
    noised = Trial(defence={**clip, "noise_multiplier": 0.1})
    assert "defended by clipping and noise, " in settings.sentence([Trial(defence=clip), noised])
    shuffled = Trial(
        num_images=4,
        client={"learning_rate": 0.01, "batch_size": 2},
        protocol={"name": "epochs", "num_epochs": 3},
    )
    said = settings.sentence([shuffled])
    assert "4 images, 3 epochs of SGD on mini-batches of 2 at 0.01, float32" in said
    assert settings.sentence([], n="no attack") == "Setting: n = no attack."


def test_equal_images_networks_and_attacks_are_counted_once():
    trials = [Trial(attack_options={"max_evaluations": n}) for n in (1, 2, 3)]
    assert settings.sentence(trials).endswith("n = 1 image, 1 network, 3 attacks.")
    again = [*trials, Trial(attack_options={"max_evaluations": 1})]
    assert settings.sentence(again).endswith("3 attacks.")


def test_a_report_reads_its_parameters_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path))
    values = {"profile": "mine", "images": 7, "networks": 1, "learning_rate": 0.1}
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


def test_per_image_reads_what_a_file_of_records_holds():
    """There a list is a text, and a trial without a picture has none."""
    trials = pandas.DataFrame(
        {
            "num_images": [2, 2, 1],
            "psnr": [15.0, math.nan, 30.0],
            "psnrs": ["10.0 20.0", None, "30"],
        }
    )
    images = tables.per_image(trials)
    assert images.psnr.fillna(-1).tolist() == [10.0, 20.0, -1, -1, 30.0]
    with pytest.raises(ValueError, match="psnr 15 and no psnrs"):
        tables.per_image(trials.drop(columns="psnrs"))


@pytest.mark.parametrize(
    "notebook", ["01_attacks_compared", "06_batches", "18_privacy_and_utility"]
)
def test_committed_records_have_a_row_for_each_image(notebook):
    """Of single images pandas reads numbers, of several texts; rows of trainings have neither."""
    records = pandas.read_csv(RECORDS / f"{notebook}.csv.gz", low_memory=False)
    images = tables.per_image(records)
    shown = records.psnr.notna()
    assert len(images) == records.num_images.fillna(1).sum()
    assert images.psnr.notna().sum() == records.num_images[shown].sum()


def test_gaps_and_options_are_values_that_rows_may_have():
    options = [{"momentum": 0.9}, {}, {"momentum": 0.9}]
    columns = {"defence": ["noise", None, None], "options": options, "scale": [0.1, math.nan, 1]}
    frame = pandas.DataFrame(columns).assign(labels=pandas.array([3, None, 3], dtype="Int64"))
    for wanted, rows in (
        ({"defence": None}, [1, 2]),
        ({"defence": ["noise", None]}, [0, 1, 2]),
        ({"scale": math.nan}, [1]),
        ({"scale": [0.1, 1]}, [0, 2]),
        ({"options": {"momentum": 0.9}}, [0, 2]),
        ({"options": {}, "defence": None}, [1]),
        ({"labels": pandas.NA}, [1]),
        ({"labels": frame.labels.unique()}, [0, 1, 2]),
    ):
        assert tables.where(frame, **wanted).index.tolist() == rows, wanted
    trials = frame.assign(index=[0, 0, 0], seed=0, psnr=[10.0, 30.0, 40.0])
    trials["dataset"] = ["digits", "digits", "lfw"]
    found, medians = tables.over_networks(trials, {"defence": "defence"})
    assert medians[None].tolist() == [35.0]
    assert found.images.tolist() == [1, 2]  # the undefended too; 0 of two sets is two images


def test_what_networks_differ_in_is_told_image_by_image():
    """Image 0 is found on both sets of networks, 1 on one, 2 on none; 2 has no picture once."""
    trials = pandas.DataFrame(
        {
            **{"attack": ["a"] * 6 + ["b"], "index": [0, 1, 2, 0, 1, 2, 0]},
            **{"seed": [0, 1, 2, 100, 101, 102, 0], "model": ["m"] * 7},
            "psnr": [30.0, 10.0, 5.0, 20.0, 25.0, math.nan, 21.0],
        }
    )
    found, medians = tables.over_networks(trials, {"attack": "attack"})
    assert found.columns[:3].tolist() == ["attack", "images", "networks each"]
    assert found.iloc[0, 1:6].tolist() == [3, 2, 1, 1, 1]
    assert found.iloc[0, 6:].tolist() == [-math.inf, 10.0, 25.0]
    assert found.iloc[1, 1:].tolist() == [1, 1, 1, 0, 0, 21.0, 21.0, 21.0]
    assert medians["a"].to_dict() == {0: 10.0, 1: 20.0} and medians["b"].tolist() == [21.0]
    both, medians = tables.over_networks(trials, {"model": "network", "attack": "attack"})
    assert both.network.tolist() == ["m", "m"] and list(medians) == [("m", "a"), ("m", "b")]
    with pytest.raises(ValueError, match="column 'client' is unknown"):
        tables.over_networks(trials, {"client": "client"})


def test_numbers_and_texts_are_said_briefly():
    assert tables.brief([0.03, math.nan, 0.123456]) == ["0.03", "", "0.123456"]
    assert tables.brief([0.123456], 2) == ["0.12"]
    assert tables.listed(["a", "b"]) == "a; b" and tables.listed([]) == "none"


# --- trials without a picture


def trials_of(*psnrs, **more):
    """A table of trials as sweeps.table makes it; None stands for a client that diverged."""
    rows = []
    for psnr in psnrs:
        row = {"name": "a", "stop_reason": "client diverged"}
        if psnr is not None:
            measured = {"psnr": psnr, "ssim": 0.5, "lpips": 0.1, "released_psnr": psnr + 10}
            row |= {"stop_reason": "converged", "labels_right": True, **measured, **more}
        rows.append(row)
    return pandas.DataFrame(rows)


def test_a_trial_without_a_picture_counts_in_every_column_of_a_summary():
    (row,) = sweeps.summarise(trials_of(25.0, 31.0, None, None), ["name"]).itertuples()
    assert (row.n, row.success_20, row.success_30) == (4, 0.5, 0.25)
    assert (row.released_20, row.labels_right) == (0.5, 0.5)
    # between a picture and none there is no median, and none of what pictures alone have
    assert all(math.isnan(x) for x in (row.psnr_25, row.psnr_50, row.ssim, row.lpips))
    assert row.psnr_75 == 26.5
    (row,) = sweeps.summarise(trials_of(10.0, 25.0, 31.0, None), ["name"]).itertuples()
    assert row.psnr_50 == 17.5 and row.ssim == 0.5 and row.lpips == 0.1


def test_a_summary_of_pictures_alone_is_pandas_own():
    psnrs = [12.3, 45.6, 20.1, 33.3, 19.99]
    (row,) = sweeps.summarise(trials_of(*psnrs), ["name"]).itertuples()
    expected = pandas.Series(psnrs).quantile([0.25, 0.5, 0.75])
    assert (row.psnr_25, row.psnr_50, row.psnr_75) == tuple(expected)


def test_where_all_clients_diverged_there_is_a_row_of_failures():
    frame = pandas.DataFrame([{"name": "a", "stop_reason": "client diverged"}] * 3)
    (row,) = sweeps.summarise(frame, ["name"]).itertuples()
    assert (row.n, row.success_20, row.released_20, row.labels_right) == (3, 0, 0, 0)
    assert math.isnan(row.psnr_50) and math.isnan(row.lpips)
    assert tables.success(frame) == 0 and tables.said(frame).startswith("0% of 3")
    assert len(tables.per_image(frame)) == 3


def test_infinite_psnrs_have_quartiles():
    (row,) = sweeps.summarise(trials_of(math.inf, math.inf, math.inf), ["name"]).itertuples()
    assert (row.psnr_25, row.psnr_50, row.psnr_75) == (math.inf,) * 3 and row.success_30 == 1
    (row,) = sweeps.summarise(trials_of(20.0, 30.0, math.inf, math.inf), ["name"]).itertuples()
    assert (row.psnr_25, row.psnr_50, row.psnr_75) == (27.5, math.inf, math.inf)
    (row,) = sweeps.summarise(trials_of(None, math.inf, math.inf), ["name"]).itertuples()
    assert math.isnan(row.psnr_25) and row.psnr_50 == math.inf


def test_one_column_may_be_given_as_text():
    frame = trials_of(25.0, 31.0)
    assert sweeps.summarise(frame, "name").equals(sweeps.summarise(frame, ["name"]))
    for wrong, message in (
        ("nam", "column of by 'nam' is unknown.*did you mean name"),
        (["name", "nam"], "column of by 'nam' is unknown"),
        ([], "by is empty"),
        (3, "by is 3; it takes a text or a Sequence of a text"),
    ):
        with pytest.raises(ValueError, match=message):
            sweeps.summarise(frame, wrong)
    with pytest.raises(ValueError, match="frame has no column 'psnr'"):
        sweeps.summarise(pandas.DataFrame({"name": ["a"], "accuracy": [0.9]}), "name")


def test_a_batch_without_a_picture_has_a_row_for_each_of_its_images():
    frame = pandas.DataFrame(
        {"num_images": [2, 3], "psnr": [15.0, math.nan], "psnrs": [[10.0, 20.0], math.nan]}
    )
    images = tables.per_image(frame)
    assert len(images) == 5 and images.psnr.isna().sum() == 3


def test_a_table_of_shares_says_how_they_count_trials_without_a_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path))
    run = report.Report("91_works")
    run.table(sweeps.summarise(trials_of(25.0, None), "name"), "Success")
    run.table(pandas.DataFrame({"psnr": [25.0]}), "One number", "one")
    said = "a trial without a picture is a failure in the shares and the worst in the medians"
    assert (tmp_path / "91_works.md").read_text().splitlines()[0] == f"Success; {said}"
    assert (tmp_path / "91_works_one.md").read_text().splitlines()[0] == "One number"


# --- claims


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path / "figures"))
    return report.Report("91_works", profile="quick")


WORKS = evidence.computed(1.0, "the run", quantity="share")


@pytest.mark.parametrize("finding", [True, numpy.True_, math.nan, "no", None, 1, WORKS])
def test_a_claim_takes_a_finding_with_its_criterion_and_no_bool(run, finding):
    with pytest.raises(ValueError, match="^finding is .*; it takes .*Finding"):
        run.claim("it works", finding, "1 of 1", whose="ours")
    assert run.claims == []


def test_a_claim_prints_its_verdict_and_keeps_a_cause_where_it_fails(run, capsys):
    run.claim("it works", WORKS.at_least(1), "1 of 1", whose="ours", cause="none")
    run.claim("it fails", WORKS.at_least(2), "0 of 1", whose="released", cause="on purpose")
    assert [claim["verdict"] for claim in run.claims] == ["holds", "does not hold"]
    assert [claim["cause"] for claim in run.claims] == ["", "on purpose"]
    assert "[holds] it works" in capsys.readouterr().out
    run.finish()


@pytest.mark.parametrize("whose", ["paper", "Ours", "", None])
def test_a_claim_of_nobody_s_is_refused(run, whose):
    with pytest.raises(
        ValueError, match="whose is .*; it takes 'released' or 'abstract' or 'ours'"
    ):
        run.claim("it works", WORKS.at_least(1), "1 of 1", whose=whose)
    assert run.claims == []


def test_a_run_is_called_by_its_profile_only_where_it_has_the_profile_s_sizes():
    wanted = report.values_of(report.catalogue()["03_dlg_needs_the_learning_rate"], "paper")
    name = report.profile_of("03_dlg_needs_the_learning_rate", wanted)
    assert name == "paper"
    smoke = report.values_of(report.catalogue()["03_dlg_needs_the_learning_rate"], "smoke")
    changed = {n: v for n, v in smoke.items() if v != wanted[n]}
    name = report.profile_of("03_dlg_needs_the_learning_rate", {**smoke, "profile": "paper"})
    assert name.startswith("paper, but ")
    assert all(f"{n} = {v!r}" in name for n, v in changed.items() if n != "profile")
    assert report.profile_of("no_such_notebook", {"profile": "mine"}) == "mine"
    assert report.profile_of("03_dlg_needs_the_learning_rate", {"profile": "mine"}) == "mine"


# --- files that several processes write

WRITER = """
import sys
import pandas
from dlm_core.harness import evidence, report
run = report.Report(sys.argv[1], profile="quick")
for i in range(40):
    run.table(pandas.DataFrame({"number": range(200), "writer": sys.argv[2]}), sys.argv[2])
tables = evidence.computed(40, "tables", quantity="count")
run.claim("it works", tables.at_least(40), whose="ours")
run.finish()
"""


def test_several_processes_may_write_the_same_files(tmp_path, environment):
    folder = environment["DLM_FIGURES"]
    names = ["91_one", "91_one", "92_two"]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name, f"writer {number}"],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for number, name in enumerate(names)
    ]
    assert [writer.communicate()[1] for writer in writers] == [""] * 3
    assert [writer.returncode for writer in writers] == [0] * 3
    manifest, claims = (report.read_json(Path(folder, f"{n}.json")) for n in ("manifest", "claims"))
    assert set(manifest) == {f"{n}.{kind}" for n in set(names) for kind in ("csv", "md")}
    assert set(claims) == set(names)
    for name in set(names):
        # of one writer, whole, and the manifest says which
        frame = pandas.read_csv(Path(folder, f"{name}.csv"))
        caption = Path(folder, f"{name}.md").read_text().splitlines()[0]
        assert len(frame) == 200 and set(frame.writer) == {caption}
        assert manifest[f"{name}.csv"]["caption"] == manifest[f"{name}.md"]["caption"] == caption
    assert not list(Path(folder).glob("**/*.tmp"))


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    report.write_atomically(tmp_path / "a.md", "old")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_atomically(tmp_path / "a.md", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]
    assert (tmp_path / "a.md").read_text() == "old"


# --- settings


def test_networks_stand_with_the_weights_that_they_have():
    default = {"init": "default"}
    one_each = [Trial(model="lenet"), Trial(model="mlp", model_options=default)]
    said = settings.sentence(one_each)
    assert "LeNet with the paper's weights, MLP with PyTorch's initial weights, " in said
    both = [*one_each, Trial(model="mlp"), Trial(model="lenet", model_options=default)]
    both += [Trial(model="resnet18")]
    said = settings.sentence(both)
    assert "LeNet or MLP with the paper's weights or PyTorch's initial weights, " in said
    assert ", ResNet-18 with the paper's weights, " in said


@pytest.mark.parametrize(
    "attacks, said",
    [
        (["dlm_plus"], "our search"),
        (["exact"], "exact recovery"),
        (["exact", "exact_batch"], "exact recovery"),
        (["dlm_plus", "exact"], "our search and exact recovery"),
    ],
)
def test_exact_recovery_is_no_search(attacks, said):
    assert settings.sentence([Trial(name) for name in attacks]).endswith(
        f", {said}; n = 1 image, 1 network, {len(attacks)} attack{'s' * (len(attacks) > 1)}."
    )


def test_labels_that_are_listed_are_told():
    assert "label told" in settings.sentence([Trial(attack_options={"labels": [3]})])


def test_only_bundled_sets_are_called_bundled(monkeypatch):
    from dlm_core import records

    mine = records.DataSet(key="mine", function=lambda: None, title="Mine")
    monkeypatch.setitem(records.DATA_SETS, "mine", mine)
    said = settings.sentence([Trial(dataset="mine"), Trial(dataset="digits")])
    assert "Mine or digits (bundled), " in said


def test_an_installed_copy_is_of_no_revision_whatever_repository_lies_around_it(monkeypatch):
    monkeypatch.setattr(report, "in_checkout", lambda: False)
    assert report.revision.__wrapped__() == "unknown"


SEVERAL = [[2, 0], (2, 0), {2, 0}, range(2, -1, -2), numpy.array([2, 0]), pandas.Series([2, 0])]


@pytest.mark.parametrize("values", SEVERAL, ids=lambda each: type(each).__name__)
def test_rows_with_one_of_several_values_in_any_container(values):
    frame = pandas.DataFrame({"index": range(3)})
    assert list(tables.where(frame, index=values)["index"]) == [0, 2]


def test_what_a_record_finds_does_not_replace_what_its_trial_is():
    """As the evidence of an attack of one's own may name it."""
    (row,) = sweeps.table([Trial("grey")], [{"psnr": 1.0, "seed": 3, "index": 7}]).to_dict(
        "records"
    )
    assert (row["seed"], row["index"], row["psnr"]) == (0, 0, 1.0)
    assert (row["found.seed"], row["found.index"]) == (3, 7)
