"""The cost of a call, measured in a process of its own."""

import os

import pytest

from dlm_core.harness import memory

MEBIBYTE = 2**20


def test_what_a_call_holds_is_counted_and_what_was_prepared_or_ran_before_is_not():
    held = b"x" * (200 * MEBIBYTE)  # by this process, at its peak

    def prepare(count):
        kept = b"x" * (50 * MEBIBYTE)
        return lambda: len(kept + b"x" * (count * MEBIBYTE))

    small, large = memory.cost(prepare, 10), memory.cost(prepare, 100)
    assert len(held) and 50 < small.mebibytes < 90
    assert 140 < large.mebibytes < 260
    assert 0 < small.milliseconds < large.milliseconds


def test_it_runs_elsewhere_as_often_as_asked_and_passes_an_error_on(tmp_path):
    def prepare(path):
        def append():
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\n")

        return append

    memory.cost(prepare, tmp_path / "calls", repeats=2)
    callers = (tmp_path / "calls").read_text().split()
    assert len(callers) == 2 and str(os.getpid()) not in callers
    with pytest.raises(ZeroDivisionError):
        memory.cost(lambda: lambda: 1 / 0)
    with pytest.raises(ValueError, match="repeats is 0"):
        memory.cost(prepare, tmp_path / "calls", repeats=0)
