"""Trials on a named device: many at once, with records of their own."""

from dataclasses import replace

import pytest
import torch

from dlm_core.harness import devices, sweeps
from dlm_core.harness.trials import Client, Protocol, Trial, repeated

KINDS = ["cpu"] + ["cuda"] * torch.cuda.is_available()
TRIAL = Trial(
    dataset="digits", attack_options={"max_evaluations": 8}, client=Client(learning_rate=0.05)
)
# Of a client, of an attack without a search, and of one that searches several times.
OTHERS = [
    replace(TRIAL, client=Client(learning_rate=1e38)),
    Trial("exact", dataset="digits", client=Client(learning_rate=0.05)),
    replace(TRIAL, attack="unrolled_dlm", attack_options={"local_steps": 1, "max_evaluations": 3}),
    replace(TRIAL, attack="dlg", attack_options={"learning_rate": 0.05, "max_evaluations": 3}),
]


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_those_of_the_trials_by_themselves_to_rounding(kind, monkeypatch):
    monkeypatch.setattr(devices, "ON_CPU", 2)  # batches of two and of one
    trials = [*repeated(TRIAL, 3), *OTHERS]
    there = sweeps.sweep(trials, store=None, jobs=1, device=kind)
    for trial, record, alone in zip(
        trials, there, sweeps.sweep(trials, store=None, jobs=1), strict=True
    ):
        assert record["device"].startswith(kind) and "device" not in alone
        assert record["stop_reason"] == alone["stop_reason"], trial
        # of pixels: at 119 dB rounding alone moves a PSNR by more than half a decibel
        errors = [10 ** (-each.get("psnr", 0.0) / 20) for each in (record, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=1e-6)
        assert record.get("evaluations") == alone.get("evaluations")
        assert record["arrays"].keys() == alone["arrays"].keys()


def test_trials_that_memory_does_not_hold_at_once_run_in_smaller_batches(monkeypatch):
    """As on a GPU whose memory runs out for more than two."""
    sizes, run = [], devices.lanes.run

    def limited(searches):
        sizes.append(len(searches))
        if len(searches) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(searches)

    monkeypatch.setattr(devices.lanes, "run", limited)
    trials = repeated(replace(TRIAL, attack_options={"max_evaluations": 2}), 5)
    found = sweeps.sweep(trials, store=None, jobs=1, device="cpu")
    assert sizes == [5, 2, 2, 1]
    for record, alone in zip(found, sweeps.sweep(trials, store=None, jobs=1), strict=True):
        assert record["psnr"] == pytest.approx(alone["psnr"], abs=0.01)


def test_a_device_s_records_are_kept_apart(tmp_path):
    trials = repeated(replace(TRIAL, attack_options={"max_evaluations": 2}), 2)
    first = sweeps.sweep(trials, store=tmp_path, jobs=1, device="cpu")
    plain = sweeps.sweep(trials, store=tmp_path, jobs=1)
    assert all("device" in record for record in first) and not any("device" in r for r in plain)
    again = sweeps.sweep(trials, store=tmp_path, jobs=1, device="cpu")
    assert [record["seconds"] for record in again] == [record["seconds"] for record in first]
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 4


def test_the_environment_names_the_device(monkeypatch):
    assert devices.named() is None
    monkeypatch.setenv("DLM_DEVICE", "cpu")
    assert devices.named() == torch.device("cpu")


@pytest.mark.parametrize("wrong", ["gpu", "", "cuda:99"])
def test_an_unknown_device_is_refused_in_a_sentence(wrong):
    with pytest.raises(ValueError, match=f"DEVICE is '{wrong}'; it takes cpu or cuda"):
        sweeps.sweep([TRIAL], store=None, device=wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="DEVICE is 'cuda', but PyTorch finds no CUDA device"):
        sweeps.sweep([TRIAL], store=None, device="cuda")


def test_a_list_of_rounds_is_no_list_of_searches():
    with pytest.raises(ValueError, match="protocol 'rounds' shows an Observation a round"):
        replace(TRIAL, protocol=Protocol("rounds", options={"num_rounds": 2}))
