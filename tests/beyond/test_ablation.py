"""One search with parts exchanged: its corners are the attacks that they claim to be."""

import pytest
import torch

from dlm_core import attacks, coordinates, objectives, optimizers
from dlm_core.beyond import ablation

BUDGET = {"max_evaluations": 30}


def same(one, other):
    return torch.equal(one.images, other.images) and list(one.losses) == list(other.losses)


def test_by_default_it_is_dlm_plus(seen):
    assert same(ablation.ablated(seen, **BUDGET), attacks.dlm_plus(seen, **BUDGET))


def test_with_all_parts_exchanged_it_is_the_released_search(seen):
    released = {
        **{"optimizer": optimizers.released_lbfgs, "dtype": torch.float32, "labels": "optimised"},
        **BUDGET,
    }
    found = ablation.ablated(seen, start="noise", box=False, smooth=False, **released)
    assert same(found, attacks.dlm_plus(seen, coordinates=coordinates.pixels, **released))


def test_its_objectives_are_those_of_the_attacks(seen):
    told = {"learning_rate": 0.05}
    dlg = ablation.ablated(seen, objective="told rate", **told, **BUDGET)
    assert same(dlg, attacks.idlg(seen, **told, **BUDGET))
    dlm = ablation.ablated(seen, objective="trained factor", **told, **BUDGET)
    assert same(dlm, attacks.dlm(seen, k0=20.0, **BUDGET))
    cosine = ablation.ablated(seen, objective="cosine", **BUDGET)
    ig = {"coordinates": coordinates.cosines, "optimizer": optimizers.lbfgs, "patience": 50}
    assert same(cosine, attacks.inverting_gradients(seen, total_variation=0.0, **ig, **BUDGET))


def test_norms():
    g = [torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 12.0]])]
    d = [torch.tensor([4.0, 3.0]), torch.tensor([[5.0, 12.0]])]
    half = objectives.cosine_distance(g, d)
    assert ablation._DISTANCES["global norm"](g, d) == pytest.approx(2 * half)
    each = 2 * (1 - 24 / 25) + 2 * (1 - 12 / 13)
    assert ablation._DISTANCES["layer norms"](g, d) == pytest.approx(each)
    zero = [*d[:1], torch.zeros(1, 2)]  # says nothing of a direction
    assert ablation._DISTANCES["layer norms"](g, zero) == pytest.approx(2 * (1 - 24 / 25))


@pytest.mark.parametrize("smooth", [True, False])
def test_coordinates_differ_by_what_they_say(smooth):
    def made(start, box):
        generator = torch.Generator().manual_seed(0)
        like = torch.zeros(1, dtype=torch.float64)
        z, to_images = ablation._coordinates(start, box, smooth)((2, 3, 8, 8), like, generator)
        return z, to_images, to_images(z)

    (z, boxed, grey), (_, free, also_grey) = made("grey", True), made("grey", False)
    noise, _, boxed_noise = made("noise", True)
    assert torch.allclose(grey, also_grey, atol=1e-3) and abs(float(grey.mean()) - 0.5) < 0.02
    assert torch.allclose(noise, 10 * z) and float(boxed_noise.std()) > 5 * float(grey.std())
    assert boxed(9 * z).min() > 0 and boxed(9 * z).max() < 1 and free(9 * noise).max() > 1
    reference = coordinates.cosines if smooth else coordinates.pixels
    generator = torch.Generator().manual_seed(0)
    _, expected = reference((2, 3, 8, 8), z, generator)
    found = boxed(z) if smooth else made("noise", False)[1](z)
    assert torch.allclose(found, expected(z), atol=1e-12)


@pytest.mark.parametrize("wrong", [{"objective": "told rate"}, {"learning_rate": 0.1}])
def test_a_rate_is_told_where_it_is_needed(seen, wrong):
    with pytest.raises(ValueError, match="learning_rate is .*; the objective"):
        ablation.ablated(seen, **wrong)
    with pytest.raises(ValueError, match="objective"):
        ablation.ablated(seen, objective="no such norm")
    with pytest.raises(ValueError, match="start"):
        ablation.ablated(seen, start="black")
