"""Whether a search fixes the brightness of its picture."""

import pytest

from dlm_core import models, objectives
from dlm_core.federated import loss as training_loss
from tests.harness.audited import SHAPE, asked, snapshots


def sentence(found):
    said = [note for note in found.notes if "brightness" in note]
    return said[0] if said else ""


def audited(kind, attack, tmp_path, **how):
    model = models.build(kind, SHAPE, 10, seed=0)
    return model, asked(model, snapshots(model, **how), tmp_path, attack=attack)


def test_a_search_that_came_to_rest_early_says_what_else_fits(tmp_path, capsys):
    model, found = audited("mlp", "dlm_plus", tmp_path)
    said = sentence(found)
    assert "its brightness is not fixed by this search: the picture times 0.8" in said
    assert said.split(": ", 1)[1] in capsys.readouterr().out
    dark = 0.8 * found["dlm_plus"].images
    g = objectives.gradient(model.double(), training_loss, dark, found["dlm_plus"].labels)
    after = snapshots(models.build("mlp", SHAPE, 10, seed=0))[1]
    update = [w.detach() - after[name].double() for name, w in model.named_parameters()]
    loss = float(objectives.normalised_distance(g, update).detach())
    assert loss < 2 * found["dlm_plus"].loss and f"loss {loss:.3g} times 0.8" in said


@pytest.mark.parametrize("attack", ["dlm_plus", "unrolled_dlm"])
def test_of_one_that_fixes_it_nothing_is_said(attack, tmp_path):
    assert not sentence(audited("lenet", attack, tmp_path)[1])
