"""What the notebooks invite a reader to change, tried under the smoke profile."""

import os

import pytest

from dlm_core.project import reproduce

SUGGESTED = [
    pytest.param(name, values, id=f"{name[:2]}-{'-'.join(values)}")
    for name, entry in reproduce.catalogue().items()
    for values in entry.get("suggested", [])
]


@pytest.mark.parametrize("name, values", SUGGESTED)
def test_a_suggested_change_runs(name, values, tmp_path, capsys, monkeypatch):
    if finished := os.environ.get("DLM_SMOKE_STORE"):  # what `make test` has just run
        monkeypatch.setenv("DLM_STORE", finished)
    failed = reproduce.run("smoke", only=name, parameters=values, out=tmp_path)
    assert failed == [], capsys.readouterr().out
