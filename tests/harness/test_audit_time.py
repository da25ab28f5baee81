"""The time of an audit: foretold, kept to a budget, and what stands when it is interrupted."""

import contextlib
import copy
import io
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from dlm_core import attacks, data, federated, models, objectives, records
from dlm_core.coordinates import cosines
from dlm_core.harness import attempt
from dlm_core.harness.audit import audit
from dlm_core.harness.foretell import NoTime, foretold, in_words
from dlm_core.harness.watch import OutOfTime, Watch
from dlm_core.results import ClientEstimate, Reconstruction, SearchEvidence, Status

SHAPE = (1, 8, 8)
IMAGES, LABELS, *_ = data.load("digits", n=2)


def client(**how):
    """(W_t, W_{t+1}) of a LeNet, by default of three steps: searches have to be made."""
    model = models.build("lenet", SHAPE, 10, seed=0)
    how = {"learning_rate": 0.05, "local_steps": 3, **how}
    seen = federated.train_locally(model, IMAGES[:1], LABELS[:1], **how)
    return model.state_dict(), seen.weights_after


@pytest.fixture
def slow(monkeypatch):
    """Makes every pass through a LeNet take so many seconds more."""

    def by(seconds):
        own = torch.nn.Sigmoid.forward

        def forward(self, z):
            time.sleep(seconds / 3)
            return own(self, z)

        monkeypatch.setattr(torch.nn.Sigmoid, "forward", forward)

    return by


def asked(sent, tmp_path, **options):
    return audit(*sent, image_shape=SHAPE, out=tmp_path / "found.png", **options)


def test_how_long_a_search_takes_is_said_before_it(tmp_path, capsys):
    asked(client(local_steps=1), tmp_path, attack="dlm_plus")
    lines = capsys.readouterr().out.splitlines()
    began = next(n for n, line in enumerate(lines) if line.startswith("dlm_plus ("))
    assert lines[began + 1].startswith("    up to about ")
    assert lines[began + 1].endswith(", for 1,600 evaluations")


def test_how_long_simulated_steps_take_is_said_by_their_number(seen):
    record = records.ATTACKS["unrolled_dlm"]
    run, said = foretold(partial(record, seen), record, math.inf)
    assert "if the client took 2 local steps, " in said[0] and " if 64, and more where" in said[0]
    _, said = foretold(run, record, time.monotonic() + 60)
    assert said[1].startswith("cut off after ")


def test_a_search_that_does_not_fit_is_shortened_and_the_last_cut_off(tmp_path, capsys, slow):
    slow(0.005)
    began = time.monotonic()
    found = asked(client(), tmp_path, minutes=0.3)
    assert time.monotonic() - began < 0.3 * 60 + 10
    said = capsys.readouterr().out
    assert "shortened to " in said and found["dlm_plus"].evaluations < 400
    assert "cut off after" in said and found.verdict != "leaked"
    cut = [each for each in found.notes if "cut off, as its time was over" in each]
    assert any(each.startswith("unrolled_dlm") for each in cut)
    assert found["unrolled_dlm"].status is Status.BUDGET
    assert (tmp_path / "found.png").is_file()


@pytest.mark.parametrize("told, bounded", [({}, True), ({"minutes": None}, False)])
def test_an_audit_takes_a_few_minutes_unless_told(tmp_path, capsys, monkeypatch, told, bounded):
    """On a clock that goes 20 seconds on each time that it is looked at."""
    sent = client(local_steps=1)
    clock = itertools.count(step=20)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    found = asked(sent, tmp_path, attack="dlm_plus", **told)
    more = "--minutes (minutes) gives more"
    assert (more in capsys.readouterr().out) == bounded
    said = [*found.notes, *(each.why for each in found.untried)]
    assert any(more in each for each in said) == bounded


def test_what_cannot_begin_in_its_time_is_left_out_and_said(tmp_path, capsys, slow):
    slow(0.3)
    found = asked(client(), tmp_path, attack="dlm_plus", minutes=0.05)
    assert not found and found.verdict != "leaked"
    said = capsys.readouterr().out
    why = next(each.why for each in found.untried if each.what == "dlm_plus")
    assert f"    left out: {why}" in said and " evaluation" in why
    assert "no attack came to a result, which is no proof" in said


def test_what_has_too_little_time_has_what_the_others_leave(tmp_path, capsys, monkeypatch):
    own, ends = attempt.foretold, []

    def hurried(run, record, until):
        if record.key != "weighted":
            raise RuntimeError("not here")
        ends.append(until)
        if len(ends) == 1:
            raise NoTime("it has half a minute")
        return own(run, record, until)

    monkeypatch.setattr(attempt, "foretold", hurried)
    found = asked(client(local_steps=1), tmp_path, minutes=1)
    assert "    put off: it has half a minute" in capsys.readouterr().out
    assert ends[1] - ends[0] > 20 and list(found) == ["weighted"]
    assert "weighted" not in {each.what for each in found.untried}


def test_an_attack_of_one_s_own_ends_with_its_time(tmp_path, capsys):
    grey, before = records.ATTACKS["grey"].function, dict(records.ATTACKS)

    @records.attack("mine", title="Mine", client="any client", audited=0)
    def mine(seen, *, num_images=1, seed=0):
        """It catches every error, and runs for ever."""
        while True:
            with contextlib.suppress(Exception):
                grey(seen, num_images=num_images)

    try:
        found = asked(client(), tmp_path, attack="mine", minutes=0.05)
    finally:
        records.ATTACKS.clear()
        records.ATTACKS.update(before)
    assert not found and "time was over" in found.untried[0].why
    assert "no attack came to a result" in capsys.readouterr().out


@pytest.mark.parametrize("loss, estimates", [(5.0, False), (0.05, True)])
def test_what_explains_little_is_no_estimate_of_the_client(tmp_path, capsys, loss, estimates):
    before = dict(records.ATTACKS)

    @records.attack("mine", title="Mine", client="any client", audited=0)
    def mine(seen, *, num_images=1, seed=0, local_steps=1, **search):
        """It says that it knows the client."""
        return Reconstruction(
            images=IMAGES[:1].clone(),
            labels=LABELS[:1],
            status=Status.STALLED,
            vouched=torch.zeros(1, dtype=torch.bool),
            evidence=SearchEvidence(losses=[loss], loss=loss),
            client=ClientEstimate(learning_rate=6e-4, local_steps=12),
        )

    try:
        asked(client(), tmp_path, attack="mine")
    finally:
        records.ATTACKS.clear()
        records.ATTACKS.update(before)
    said = capsys.readouterr().out
    assert ("learning rate 0.0006" in said) == ("local steps 12" in said) == estimates
    assert ("labels [" in said) == estimates


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), "two"])
def test_a_budget_is_a_positive_number(tmp_path, minutes):
    with pytest.raises(ValueError, match="minutes is "):
        asked(client(), tmp_path, minutes=minutes)


def test_no_search_is_made_that_cannot_be_believed_further(tmp_path, capsys):
    """Of one layer with two outputs the exact attack explains all; any image shares its doubt."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    trained = copy.deepcopy(model)
    F.cross_entropy(trained(IMAGES[:1]), torch.tensor([1])).backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    found = asked((model.state_dict(), trained.state_dict()), tmp_path, model=model)
    assert list(found) == ["division", "exact"] and found.verdict == "partly"
    why = {each.what: each.why for each in found.untried}
    for name in ("dlm_plus", "unrolled_dlm"):
        assert why[name].startswith("exact explains the update already")
    assert f"not tried: dlm_plus: {why['dlm_plus']}" in capsys.readouterr().out


def test_a_watch_changes_no_search(seen):
    plain = attacks.dlm_plus(seen, max_evaluations=30)
    with Watch("dlm_plus") as watch:
        watched = attacks.dlm_plus(seen, max_evaluations=30, coordinates=watch.noting(cosines))
    assert torch.equal(plain.images, watched.images) and len(watch.taken) == plain.evaluations
    attacks.dlm_plus(seen, max_evaluations=2)
    assert len(watch.taken) == plain.evaluations  # it watches no longer


def interrupted_after(evaluations):
    """A gradient that raises after so many."""
    made = []

    def gradient(*given):
        made.append(1)
        if len(made) > evaluations:
            raise KeyboardInterrupt
        return objectives.gradient(*given)

    return gradient


def test_a_watch_keeps_the_best_point_of_what_ends(seen):
    whole = attacks.dlm_plus(seen, max_evaluations=20)
    with pytest.raises(KeyboardInterrupt), Watch("dlm_plus") as watch:
        options = {"coordinates": watch.noting(cosines), "update_of": interrupted_after(20)}
        attacks.dlm_plus(seen, **options)
    assert watch.so_far.loss == whole.loss and torch.equal(watch.so_far.images, whole.images)
    assert watch.so_far.status is Status.BUDGET and watch.so_far.labels.tolist() == [-1]


def test_a_search_ends_when_its_time_is_over_whichever_the_thread(seen):
    ended = []

    def search():
        try:
            with Watch("dlm_plus", time.monotonic() - 1):
                attacks.dlm_plus(seen)
        except OutOfTime:
            ended.append(True)

    other = threading.Thread(target=search)
    other.start()
    other.join()
    search()
    assert ended == [True, True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_alarm_that_garbage_collection_swallows_rings_again():
    class Slow:
        def __del__(self):  # what is raised here is lost
            time.sleep(0.6)

    began = time.monotonic()
    with pytest.raises(OutOfTime), Watch("a loop", began + 0.2):
        garbage = Slow()
        del garbage
        while time.monotonic() < began + 20:
            pass
    assert time.monotonic() < began + 10


def test_progress_is_a_line_of_a_terminal_and_gone_at_the_end(seen, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Watch("dlm_plus"):
        attacks.dlm_plus(seen, max_evaluations=5)
    said = terminal.getvalue()
    assert "dlm_plus: 1 evaluation, loss " in said and said.endswith("\r\x1b[K")
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    with Watch("dlm_plus"):
        attacks.dlm_plus(seen, max_evaluations=5)
    assert not file.getvalue()


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0.1 seconds"), (1.44, "1.4 seconds"), (61, "61 seconds"), (130, "3 minutes"),
     (7300, "3 hours"), (200_000, "3 days")],
)  # fmt: skip
def test_times_are_said_in_words(seconds, words):
    assert in_words(seconds) == words


INTERRUPTED = """
import os, signal, sys
import torch
from dlm_core.__main__ import main

passes, own = [], torch.nn.Sigmoid.forward

def forward(self, z):
    passes.append(1)
    if len(passes) == 200:
        os.kill(os.getpid(), signal.SIGINT)
    return own(self, z)

torch.nn.Sigmoid.forward = forward
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_keeps_what_was_found(tmp_path):
    before, after = client()
    torch.save(before, tmp_path / "before.pt")
    torch.save(after, tmp_path / "after.pt")
    files = ["before.pt", "after.pt", "--image-shape", "1,8,8"]
    command = [sys.executable, "-c", INTERRUPTED, "attack", *files]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    assert "    interrupted after " in done.stdout and "explains" in done.stdout
    assert "not tried: unrolled_dlm: the audit was interrupted" in done.stdout
    assert "found" in done.stdout and (tmp_path / "reconstruction.png").is_file()
    assert done.stderr == ""  # no progress, where there is no terminal


def test_an_alarm_waits_for_an_import_to_end(tmp_path, monkeypatch):
    (tmp_path / "slow_to_load.py").write_text("import time\ntime.sleep(0.5)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    began = time.monotonic()
    with pytest.raises(OutOfTime), Watch("an import", began + 0.1):
        import slow_to_load

        while time.monotonic() < began + 10:
            pass
    assert slow_to_load.whole and time.monotonic() < began + 5


def test_a_search_that_is_cut_off_leaves_gradients_on():
    began = time.monotonic()
    with pytest.raises(OutOfTime), Watch("a loop", began + 0.1):
        torch.set_grad_enabled(False)  # as within a context whose exit the alarm takes away
        while time.monotonic() < began + 10:
            pass
    assert torch.is_grad_enabled()
