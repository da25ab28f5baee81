"""Trials are values, records are reproducible, and no finished trial is ever lost."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch

from dlm_core import records, results
from dlm_core.harness import scene, sweeps, trials
from dlm_core.harness.judge import judge
from dlm_core.harness.trials import Trial

FAST = Trial(
    dataset="digits",
    attack_options={"max_evaluations": 25, "keep_every": 10},
    client={"learning_rate": 0.05},
)
IDLG = replace(FAST, attack="idlg", attack_options={**FAST.attack_options, "learning_rate": 0.05})
SWEEP = [replace(trial, index=i) for i in range(3) for trial in (FAST, IDLG)]


def comparable(record):
    return {name: value for name, value in record.items() if name not in ("arrays", "seconds")}


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert comparable(a) == comparable(b)
        assert a["arrays"].keys() == b["arrays"].keys()
        assert all(torch.equal(a["arrays"][name], b["arrays"][name]) for name in a["arrays"])


@pytest.fixture(scope="module")
def expected():
    return [trials.run_trial(trial) for trial in SWEEP]


@pytest.mark.parametrize("jobs", [1, 2])
def test_bit_identical_for_any_number_of_workers(expected, jobs, tmp_path):
    assert_same(sweeps.sweep(SWEEP, jobs=jobs, store=tmp_path), expected)
    assert_same(sweeps.sweep(SWEEP, jobs=jobs, store=tmp_path), expected)  # and from the store


def cluster(threads):
    distributed = pytest.importorskip("distributed")
    made = distributed.LocalCluster(
        n_workers=1, threads_per_worker=threads, processes=True, dashboard_address="127.0.0.1:0"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made


def test_bit_identical_on_a_cold_dask_worker_of_four_threads(tmp_path):
    """Its threads share the global random generator and torch's number of threads."""
    networks = ({"model": "lenet", "model_options": {"depth": 2}}, {"model": "mlp"})
    plan = [
        replace(FAST, attack_options={"max_evaluations": 10}, index=i, seed=i, **network)
        for i in range(12)
        for network in networks
    ]
    with cluster(threads=4) as workers, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sweeps.sweep(plan, store=tmp_path, scheduler=workers.scheduler_address)
    assert_same(found, [trials.run_trial(trial) for trial in plan])


def test_thread_count_does_not_matter_and_is_restored(expected):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same([trials.run_trial(SWEEP[0])], expected[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_second_sweep_computes_only_what_is_missing(tmp_path, monkeypatch):
    sweeps.sweep(SWEEP[:2], jobs=1, store=tmp_path)
    ran, run_trial = [], trials.run_trial
    monkeypatch.setattr(trials, "run_trial", lambda trial: ran.append(trial) or run_trial(trial))
    sweeps.sweep(SWEEP[:4], jobs=1, store=tmp_path)
    assert ran == SWEEP[2:4]


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def emptied(content):
    """The same file with a record that says nothing."""
    from safetensors.torch import load, save

    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])["__metadata__"]
    return save(load(content), metadata={**about, "record": "{}"})


DAMAGES = {
    "an empty file": lambda content, other: b"",
    "no record": lambda content, other: b"not a record",
    "half a file": lambda content, other: content[:200],
    "a bit of a picture": lambda content, other: flipped(content, len(content) - 30),
    "a bit of a number": lambda content, other: flipped(content, content.index(b"psnr") + 9),
    "a record that says nothing": lambda content, other: emptied(content),
    "the file of another trial": lambda content, other: other,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_said_and_computed_again(expected, tmp_path, damage):
    sweeps.sweep(SWEEP[:2], jobs=1, store=tmp_path)
    path, other = (sweeps.Store(tmp_path).path(trial.key) for trial in SWEEP[:2])
    path.write_bytes(damage(path.read_bytes(), other.read_bytes()))
    said = f"store entry {path.name} is damaged .* computed again"
    with pytest.warns(UserWarning, match=said) as caught:
        assert_same(sweeps.sweep(SWEEP[:1], jobs=1, store=tmp_path), expected[:1])
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert_same(sweeps.sweep(SWEEP[:1], jobs=1, store=tmp_path), expected[:1])


def test_two_that_write_one_entry_at_once_do_not_meet(expected, tmp_path):
    store = sweeps.Store(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.put(SWEEP[0], expected[0]), range(40)))
    assert_same([store.get(SWEEP[0])], expected[:1])
    assert [path.suffix for path in tmp_path.rglob("*.*")] == [".safetensors"]


def test_kill_minus_nine_loses_no_finished_trial_and_ends_in_the_same_table(expected, tmp_path):
    script = (
        "from tests.harness.test_trials import SWEEP\n"
        "from dlm_core import sweeps, trials; import time\n"
        "run = trials.run_trial\n"
        "def slow(trial):\n    record = run(trial)\n    time.sleep(0.3)\n    return record\n"
        "trials.run_trial = slow\n"
        f"sweeps.sweep(SWEEP, jobs=1, store={str(tmp_path)!r})"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while len(list(tmp_path.rglob("*.safetensors"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert 2 <= len(finished) < len(SWEEP)
    assert_same(sweeps.sweep(SWEEP, jobs=1, store=tmp_path), expected)
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items())


def test_the_workers_of_a_killed_sweep_end_too(tmp_path):
    script = (
        "from dlm_core import sweeps, trials\n"
        "base = trials.Trial(dataset='digits', client={'learning_rate': 0.05})\n"
        "plan = trials.repeated(base, 500)\n"
        f"sweeps.sweep(plan, jobs=2, store={str(tmp_path)!r})"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not list(tmp_path.rglob("*.safetensors")) and time.time() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    child.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=15)[1]


def test_the_table_is_the_same_text_each_time(expected):
    again = [trials.run_trial(trial) for trial in SWEEP]
    first, second = (
        sweeps.table(SWEEP, records).drop(columns="seconds").to_csv()
        for records in (expected, again)
    )
    assert first == second
    assert {"attack", "index", "client.learning_rate", "psnr", "stop_reason"} <= set(
        sweeps.table(SWEEP, expected).columns
    )


def test_the_longest_begins_first_and_records_keep_their_places():
    """A worker that gets a long trial last keeps the others waiting."""
    begun = []

    class Own:
        def __init__(self, evaluations):
            self.key = str(evaluations)
            self.attack_options = {"max_evaluations": evaluations}

        def run(self):
            begun.append(self.key)
            return {"value": self.key, "arrays": {}}

    records = sweeps.sweep([Own(5), Own(300), Own(20)], jobs=1, store=None)
    assert begun == ["300", "20", "5"]
    assert [record["value"] for record in records] == ["5", "300", "20"]


def test_an_interrupt_keeps_what_is_done(tmp_path, monkeypatch):
    run_trial = trials.run_trial

    def interrupted(trial):
        if trial == SWEEP[2]:
            raise KeyboardInterrupt
        return run_trial(trial)

    monkeypatch.setattr(trials, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweeps.sweep(SWEEP, jobs=1, store=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_keys_tell_trials_apart():
    keys = {
        trial.key
        for trial in (
            *SWEEP,
            replace(FAST, seed=1),
            replace(FAST, defence={"name": "sparsify", "percent": 10}),
        )
    }
    assert len(keys) == len(SWEEP) + 2


def test_a_client_that_diverges_is_a_record(tmp_path):
    (record,) = sweeps.sweep(
        [replace(FAST, client={"learning_rate": 1e38, "local_steps": 3})], jobs=1, store=tmp_path
    )
    assert record["stop_reason"] == "client diverged"
    assert (
        sweeps.sweep(
            [replace(FAST, client={"learning_rate": 1e38, "local_steps": 3})],
            jobs=1,
            store=tmp_path,
        )[0]["stop_reason"]
        == "client diverged"
    )


def test_a_client_whose_weights_do_not_change_is_a_record(tmp_path):
    (record,) = sweeps.sweep(
        [replace(FAST, client={"learning_rate": 1e-30})], jobs=1, store=tmp_path
    )
    assert record["stop_reason"] == "client unchanged"


NOISY = {"defence": {"name": "noise", "scale": 1e-3, "observer": "server"}}


def test_a_simulation_of_the_client_with_the_attack_s_seed_does_not_draw_its_noise():
    trial = replace(FAST, **NOISY, seed=3)
    clear, *_ = trials.observe(replace(trial, defence=None))
    seen, *_ = trials.observe(trial)
    sent, simulated = seen.delta[0], trial.defence.defend(clear, trial.seed).delta[0]
    noise, guessed = (each - clear.delta[0] for each in (sent, simulated))
    correlation = torch.corrcoef(torch.stack([noise.flatten(), guessed.flatten()]))[0, 1]
    assert noise.std() > 0 and abs(correlation) < 5 / noise.numel() ** 0.5


def test_each_client_of_each_round_has_noise_of_its_own():
    """Seed 0 in round 101 had the noise of seed 10201 in round 0."""
    trial = replace(FAST, **NOISY, seed=0)
    clear, *_ = trials.observe(replace(trial, defence=None))
    sent = [
        scene.defend(replace(trial, seed=seed), clear, turn, client).delta[0]
        for seed, turn, client in [(0, 101, 0), (10201, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0)]
    ]
    assert len({tuple(each.flatten().tolist()) for each in sent}) == len(sent)


def test_an_attack_does_not_draw_the_client_s_dropout_mask():
    """Both followed from one seed: the first evaluation had the client's mask."""
    drawn = []

    class Masked(torch.nn.Module):
        def forward(self, features):
            mask = torch.rand_like(features) < 0.5
            drawn.append(mask.flatten())
            return features * mask

    @records.network("mine", title="Mine")
    def mine(image_shape, num_classes):
        size = torch.Size(image_shape).numel()
        layers = torch.nn.Flatten(), torch.nn.Linear(size, 16), Masked()
        return torch.nn.Sequential(*layers, torch.nn.Linear(16, num_classes))

    try:
        trial = replace(FAST, model="mine", seed=4)
        seen, _, labels = trials.observe(trial)
        of_client = [mask for mask in drawn if len(mask) == 16][-1]
        drawn.clear()
        trials.attack(trial, seen, labels)
        assert drawn and not any(torch.equal(mask, of_client) for mask in drawn)
    finally:
        records.NETWORKS.pop("mine")


def test_labels_may_be_a_list():
    given = replace(FAST, attack_options={**FAST.attack_options, "labels": "given"})
    _, _, labels = trials.observe(given)
    listed = replace(FAST, attack_options={**FAST.attack_options, "labels": labels.tolist()})
    assert_same([trials.run_trial(listed)], [trials.run_trial(given)])


def test_record_of_a_defended_batch():
    trial = replace(
        FAST,
        num_images=2,
        client={"learning_rate": 0.05, "client_optimizer": "adam"},
        defence={"name": "noise", "scale": 1e-6},
    )
    record = trials.run_trial(trial)
    assert len(record["psnrs"]) == 2 and record["history_evaluations"] == [0, 10, 20]
    assert record["arrays"]["images"].shape == (2, 1, 8, 8) and record["lpips"] is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attack": "dlm_pluss"}, "attack 'dlm_pluss' is unknown.*did you mean dlm_plus"),
        ({"model": "lenett"}, "model 'lenett' is unknown.*did you mean lenet"),
        ({"dataset": "cifar10"}, "dataset 'cifar10' is unknown.*did you mean cifar100"),
        ({"index": -1}, "index is -1"),
        ({"num_images": 0}, "num_images is 0"),
        ({"client": {"learning_rate": -1}}, "learning_rate is -1"),
        (
            {"client": {"learning_rate": 1, "client_optimizer": "sdg"}},
            "client_optimizer 'sdg' is unknown.*did you mean sgd",
        ),
        ({"defence": {"name": "noize"}}, "defence 'noize' is unknown.*did you mean noise"),
        (
            {"attack_options": {"optimizer": "lbgs"}},
            "optimizer 'lbgs' is unknown.*did you mean lbfgs",
        ),
        (
            {"client": {"learning_rate": 1, "optimizer_options": {"momentun": 0.9}}},
            "optimizer_options 'momentun' is unknown.* mean momentum",
        ),
        ({"protocol": {"name": "two_hops", "attack": "exactt"}}, "attack 'exactt' .* mean exact"),
        ({"protocol": "fedsgd"}, "protocol is 'fedsgd'; it takes a Protocol or a dict with a name"),
        (
            {"attack_options": {"trusted": [torch.ones(2)]}},
            "attack_options is .*numbers, texts.*'trusted'",
        ),
        ({"model_options": 3}, "model_options is 3; it takes a dict of options"),
        ({"source": "bundle"}, "source 'bundle' is unknown.*did you mean bundled"),
        (
            {"attack_options": {"dtype": "float46"}},
            "dtype 'float46' is unknown.*did you mean float64",
        ),
        ({"attack_options": {"max_evaluations": -5}}, "max_evaluations is -5"),
        ({"attack_options": {"labels": "givn"}}, "labels 'givn' is unknown.* mean given"),
        (
            {"attack": "sign_dlm", "attack_options": {"total_variation": -1}},
            "total_variation is -1",
        ),
        ({"protocol": {"name": "fedsgd", "num_rounds": -3}}, "num_rounds is -3"),
        (
            {"protocol": {"name": "fedsgd"}, "client": {"local_steps": 5}},
            "option of a client of fedsgd 'local_steps' is unknown",
        ),
        (
            {
                **{"attack": "learned_prior", "attack_options": {"learning_rate": 0.05}},
                **{"index": 100, "defence": {"name": "noise", "scale": 0.1}},
            },
            "index is 100 .* trained on digits from 100 on",
        ),
        (
            {"attack": "aware_exact", **NOISY, "attack_options": {"max_steps": -1}},
            "max_steps is -1",
        ),
        ({"protocol": {"name": "aggregate", "local_steps": 0}}, "local_steps is 0"),
        ({"attack_options": {"labels": [-1]}}, "class indices of at least 0, and not -1"),
    ],
)
def test_a_bad_trial_is_refused_when_it_is_made(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FAST, **change)


def test_a_user_s_attack_takes_what_it_says_in_words_of_its_own():
    """Lists are kept as tuples; annotations may be texts that mean nothing to us."""

    @records.attack("mine", title="Mine")
    def mine(
        seen,
        *,
        layers: list[int] = [0],  # noqa: B006
        scale: "how strong" = 1,  # noqa: F722
        patience=0.5,
    ):
        return None

    try:
        own = replace(FAST, attack="mine", attack_options={"layers": [0, 2], "scale": "auto"})
        assert own.attack_options["layers"] == (0, 2)
        replace(own, attack_options={"patience": 0})
        with pytest.raises(ValueError, match="'layer' is unknown.*did you mean layers"):
            replace(own, attack_options={"layer": [0]})
    finally:
        records.ATTACKS.pop("mine")


def test_an_unwritable_store_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="store folder .* cannot be written"):
        sweeps.sweep([FAST], store=tmp_path / "file")


def test_an_unreachable_scheduler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "PATIENCE", "1s")
    with pytest.raises(ConnectionError, match="SCHEDULER 'tcp://127.0.0.1:9' cannot be reached"):
        sweeps.sweep([FAST], store=tmp_path, scheduler="tcp://127.0.0.1:9")


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    sweeps.sweep(SWEEP[:1], jobs=1, store=tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"^a record cannot be written to .*No space.*are kept$"):
        sweeps.sweep(SWEEP[:2], jobs=1, store=tmp_path)
    assert sweeps.Store(tmp_path).get(SWEEP[0]) is not None
    assert list(tmp_path.rglob("*.tmp")) == []


@dataclass(frozen=True)
class Unlucky:
    """A value that a sweep runs: it ends its process, raises, or is fine."""

    number: int
    how: str = "fine"
    key = property(lambda self: f"{self.number:032d}")

    def run(self):
        if self.how == "killed":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "raises":
            raise ZeroDivisionError("division\nby zero")
        return {"number": self.number, "arrays": {}}


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (1, 8, 8), (1, 1, 8, 9)])
def test_another_number_or_size_of_images_than_the_client_s_is_not_judged(shape):
    found = results.baseline(torch.full(shape, 0.5))
    with pytest.raises(ValueError, match="returned images of shape"):
        judge(found, torch.rand(1, 1, 8, 8), torch.tensor([3]))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_trial_is_named_and_finished_ones_are_kept(tmp_path, jobs):
    plan = [Unlucky(0), Unlucky(1), Unlucky(2, "raises")]
    said = (
        "Unlucky(number=2, how='raises') failed: ZeroDivisionError: division by zero; "
        f"of 3 trials to run those finished are kept in {tmp_path}"
    )
    with pytest.raises(sweeps.Failed) as caught:
        sweeps.sweep(plan, jobs=jobs, store=tmp_path)
    assert str(caught.value) == said
    where = "".join(traceback.format_exception(caught.value))
    assert 'raise ZeroDivisionError("division' in where, "where it failed can be read"
    assert jobs > 1 or sweeps.Store(tmp_path).get(plan[1])["number"] == 1


def test_a_killed_worker_is_said_in_one_sentence(tmp_path):
    plan = [*map(Unlucky, range(3)), Unlucky(3, "killed")]
    said = f"^a worker process was ended by SIGKILL.* kept in {tmp_path}: run again, with fewer"
    with pytest.raises(sweeps.Failed, match=said) as caught:
        sweeps.sweep(plan, jobs=2, store=tmp_path)
    assert "\n" not in str(caught.value)
    assert sweeps.Store(tmp_path).get(plan[0])["number"] == 0
    assert len(sweeps.sweep(plan[:3], jobs=2, store=tmp_path)) == 3


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "2"])
def test_a_wrong_number_of_jobs_is_refused(jobs, monkeypatch):
    with pytest.raises(ValueError, match=f"jobs is {jobs!r}; it takes .*a whole number"):
        sweeps.sweep([FAST], jobs=jobs, store=None)
    monkeypatch.setenv("DLM_JOBS", str(jobs))
    if jobs != "2":
        with pytest.raises(ValueError, match=f"DLM_JOBS is '{jobs}'; it takes a whole number"):
            sweeps.sweep([FAST], store=None)


def test_a_client_may_compute_and_transmit_in_another_precision():
    seen, *_ = trials.observe(Trial(client={"learning_rate": 0.01, "dtype": "float64"}))
    assert all(w.dtype == torch.float64 for w in seen.weights_after.values())
    seen, *_ = trials.observe(Trial(client={"learning_rate": 0.1, "transmitted": "float16"}))
    assert all(torch.equal(w, w.half().float()) for w in seen.weights_after.values())
    with pytest.raises(ValueError, match="transmitted.*int8"):
        Trial(client={"learning_rate": 0.1, "transmitted": "int8"})


def test_a_client_may_leave_running_statistics_alone():
    options = {"width": 4, "blocks": 1}
    for mode, moved in (("train", True), ("eval", False)):
        seen, *_ = trials.observe(
            Trial(
                model="resnet18_bn",
                model_options=options,
                client={"learning_rate": 0.1, "mode": mode},
            )
        )
        assert seen.model.training == moved == bool(seen.weights_after["1.num_batches_tracked"])
    with pytest.raises(ValueError, match="mode 'evil' is unknown"):
        Trial(client={"learning_rate": 0.1, "mode": "evil"})


def test_trials_that_share_a_trained_model_do_not_share_its_changes():
    trained = replace(FAST, trained=1)
    first, again = (
        trials.observe(replace(trained, client=client))[0]
        for client in ({"learning_rate": 0.1}, {"learning_rate": 0.2})
    )
    assert all(
        torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters())
    )
    assert first.model is not again.model
    double, *_ = trials.observe(
        replace(trained, client={"learning_rate": 0.1, "dtype": "float64", "mode": "eval"})
    )
    third, *_ = trials.observe(trained)
    assert next(double.model.parameters()).dtype == torch.float64 and not double.model.training
    assert next(third.model.parameters()).dtype == torch.float32 and third.model.training
    untrained, *_ = trials.observe(FAST)
    assert not torch.equal(next(untrained.model.parameters()), next(third.model.parameters()))


def test_a_batch_may_be_told_the_last_image_s_label_and_trained_for_one_class():
    plain = Trial(attack="dlm_plus", dataset="digits", model="mlp", num_images=3)
    seen, _, labels = trials.observe(replace(plain, client={"label": 7}))
    assert labels.tolist() == [7, 7, 7] and int(seen.delta[-1].argmin()) == 7
    assert len(set(trials.observe(plain)[2].tolist())) == 3
    budget = {"max_evaluations": 2}
    for told, expected in (("given", [0, 1, 2]), ("last", [2, 2, 2])):
        seen, _, labels = trials.observe(plain)
        trial = replace(plain, attack_options={"labels": told, **budget})
        assert trials.attack(trial, seen, labels).labels.tolist() == expected
    with pytest.raises(ValueError, match=r"label is 10; it takes a whole number in \[0, 9\]"):
        Trial(dataset="digits", client={"label": 10})
