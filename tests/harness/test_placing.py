"""What is computed follows the device of the client's network: seen on a CPU by ``elsewhere``."""

import pytest
import torch

from dlm_core import data, models, records
from dlm_core.beyond import at_once
from dlm_core.beyond.fisher import noise_for, of_update
from dlm_core.harness import registry  # noqa: F401, it fills the tables
from dlm_core.harness.battery import BUDGETS, TOLD, Scene
from tests.elsewhere import Elsewhere, is_unplaced

# One walks through a copy of the network on the CPU, the other trains its prior there.
ON_CPU = {"weighted", "learned_prior"}


@pytest.mark.parametrize("key", sorted(records.ATTACKS.keys() - ON_CPU))
def test_an_attack_keeps_to_the_device_of_the_network(key):
    record = records.ATTACKS[key]
    options = {name: n for name, n in BUDGETS.items() if name in record.options}
    options |= {name: TOLD[name] for name in record.demands if name in TOLD}
    seen = Scene(**record.scene).observe(1)
    with Elsewhere():
        found = record(seen, num_images=1, **options, **record.example)
    assert not any(map(is_unplaced, (found.images, found.labels, found.vouched)))


@pytest.mark.parametrize("prior", ["white", "smooth"])
@pytest.mark.parametrize("network", ["lenet", "mlp"])
def test_information_keeps_to_the_device_of_the_network(network, prior):
    images, labels, *_ = data.load("digits", n=1)
    model = models.build(network, (1, 8, 8), 10, seed=3)
    with Elsewhere():
        found = of_update(model, images, labels, learning_rate=0.05)
        noise_for(model, images, labels, learning_rate=0.05, prior=prior)
        assert not is_unplaced(found.posterior(prior).variance)


def test_a_tensor_without_a_device_is_found():
    """The stand-in itself: what an attack must not do, and what it may."""
    there = torch.ones(3)
    with Elsewhere():
        with pytest.raises(RuntimeError, match=r"mul: tensors of shapes \[\(3,\)\] have no device"):
            there * torch.arange(3).double()
        with pytest.raises(RuntimeError, match="cat"):
            torch.cat([there, 2 * torch.zeros(2)])
        fine = (
            there * torch.arange(3).to(there) + torch.eye(3, device=there.device) + torch.ones(())
        )
        assert not is_unplaced(fine[torch.arange(2)])
        assert is_unplaced(torch.randn(2).double())


def test_a_gpu_takes_as_many_as_half_of_its_free_memory_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert at_once.at_once(100, gpu, 64) == 5 and at_once.at_once(100, cpu, 64) == 64
    assert at_once.at_once(1e9, gpu, 64) == 1
