"""What belongs to the whole process is taken in turns and left as it was."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.backends import cudnn

from dlm_core import models, threads


def weights(seed):
    return models.build("mlp", (1, 8, 8), 10, seed=seed)[1].weight


def test_networks_built_on_several_threads_have_the_weights_of_their_seeds():
    seeds = [i % 8 for i in range(64)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(weights, seeds))
    assert torch.equal(torch.get_rng_state(), before)
    expected = [weights(seed) for seed in range(8)]
    assert all(torch.equal(w, expected[seed]) for w, seed in zip(built, seeds))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_on_a_gpu_convolutions_are_computed_in_the_precision_that_was_asked_for(on_gpu):
    weight = SimpleNamespace(numel=lambda: 3, is_cuda=on_gpu)
    network = SimpleNamespace(parameters=lambda: iter([weight]))
    before = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    with threads.for_network(network):
        assert torch.get_num_threads() == 1
        inside = (False, True) if on_gpu else (before[3], before[2])
        assert (cudnn.allow_tf32, cudnn.deterministic) == inside
        assert (cudnn.enabled, cudnn.benchmark) == before[:2]
    assert before == (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
