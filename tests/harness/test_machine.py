"""What is said of the machine."""

import torch

from dlm_core.harness import machine, report

CPUINFO = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
processor\t: 1
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
"""


def test_a_processor_is_told_from_others_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    assert machine.processor() == "AMD EPYC (family 25, model 17)"
    (tmp_path / "cpuinfo").write_text("nothing of it")
    assert machine.processor()
    (tmp_path / "cpuinfo").unlink()
    assert machine.processor()


def test_the_manifest_names_the_machine():
    about = report.Report("00_quickstart").provenance()
    assert about.items() >= machine.description().items()
    assert about["threads"] == torch.get_num_threads() and about["cores"] >= 1
    assert about["blas"].startswith("torch ") and ", numpy " in about["blas"]


def test_the_manifest_names_the_device_of_trials_where_there_is_one(monkeypatch):
    assert "device" not in report.Report("00_quickstart").provenance()
    monkeypatch.setenv("DLM_DEVICE", "cpu")
    about = report.Report("00_quickstart").provenance()
    assert about["device"] == f"cpu {machine.processor()}"
