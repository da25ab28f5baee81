"""Shared fixtures: a small network, attacked in a fraction of a second, and real images."""

import math
import os
import signal

import pytest
import torch
from torch import nn

from dlm_core import data, federated, models, records

torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore interrupts, and all they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Side by side, a file goes to one worker, which makes its fixtures once; suggestions, each a
    notebook to run, are shared out.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "test_suggestions" in nodeid else super()._split_scope(nodeid)

    return ByFile(config, log)


@pytest.fixture(params=["cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    """No test reads or writes the user's store and figures."""
    monkeypatch.setenv("DLM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DLM_FIGURES", str(tmp_path / "figures"))
    for name in ("SCHEDULER", "DLM_JOBS", "DLM_PROGRESS", "DLM_DEVICE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def digit(device):
    """One real 8x8 digit, [1, 1, 8, 8], and its label."""
    images, labels, *_ = data.load("digits", n=1)
    return images.to(device), labels.to(device)


@pytest.fixture
def small(device):
    """A LeNet for 8x8 digits."""
    return models.build("lenet", (1, 8, 8), 10, seed=3).to(device)


@pytest.fixture
def seen(small, digit):
    return federated.train_locally(small, *digit, learning_rate=0.05)


@pytest.fixture
def dropping():
    """The name of a network of a user's own that draws at random in training."""

    @records.network("dropping", title="With dropout")
    def network(image_shape, num_classes):
        size = math.prod(image_shape)
        layers = [nn.Linear(size, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, num_classes)]
        return nn.Sequential(nn.Flatten(), *layers)

    yield "dropping"
    records.NETWORKS.pop("dropping")


@pytest.fixture
def environment(tmp_path):
    """Environment of a subprocess that keeps to this test's folders."""
    return {
        **os.environ,
        "DLM_STORE": str(tmp_path / "store"),
        "DLM_FIGURES": str(tmp_path / "figures"),
    }
