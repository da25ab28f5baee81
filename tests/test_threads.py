"""What belongs to the whole process is taken in turns and left as it was."""

from concurrent.futures import ThreadPoolExecutor

import torch

from dlm_core import models


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
