"""A timed trial finds what the trial finds, and says how long a processor took."""

import time
from dataclasses import replace

from dlm_core import records
from dlm_core.harness import sweeps
from dlm_core.harness.timed import Timed
from dlm_core.harness.trials import Trial

TRIAL = Trial(attack="grey", dataset="digits", model="mlp")


def test_it_is_the_trial_s_record_and_the_processor_s_seconds(tmp_path):
    began = time.process_time()
    record, untimed = sweeps.sweep([Timed(TRIAL), TRIAL], jobs=1, store=tmp_path)
    assert record["psnr"] == untimed["psnr"]
    assert 0 < record["processor_seconds"] <= time.process_time() - began
    (kept,) = sweeps.sweep([Timed(TRIAL)], jobs=1, store=tmp_path)
    assert kept["processor_seconds"] == record["processor_seconds"]  # it was not run again


def test_waiting_is_not_the_processor_s_time(monkeypatch):
    grey = records.ATTACKS["grey"]
    asked = []

    def slow(seen, **options):
        asked.append(time.sleep(0.5))
        return grey.function(seen, **options)

    monkeypatch.setitem(records.ATTACKS, "grey", replace(grey, function=slow))
    began = time.perf_counter()
    record = Timed(TRIAL).run()
    assert asked and record["processor_seconds"] < time.perf_counter() - began - 0.4


def test_each_trial_has_a_key_of_its_own_and_the_code_of_its_attack_is_in_it():
    others = [replace(TRIAL, seed=1), replace(TRIAL, attack="dlm_plus")]
    assert len({Timed(each).key for each in [TRIAL, *others]}) == 3
    assert Timed(TRIAL).key != TRIAL.key
