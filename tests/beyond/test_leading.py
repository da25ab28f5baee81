"""The leading direction of an update, where it has no longer rank one."""

import pytest
import torch

from dlm_core import data, federated, models
from dlm_core.beyond import leading, preprocessing
from dlm_core.beyond.weighted import weighted
from dlm_core.harness.tutorials import coloured, nearest
from dlm_core.observation import observe

MOMENTUM = {"learning_rate": 0.01, "optimizer_options": {"momentum": 0.9}}


@pytest.fixture(scope="module")
def face():
    faces = data.load("lfw", n=1)
    return coloured(faces.images), torch.tensor([3])


def client(face, **options):
    model = models.build("tutorial", (3, 32, 32), 10, seed=0, init="default")
    model = preprocessing.normalised(model, preprocessing.KNOWN["half"])
    return federated.train_locally(model, *face, **MOMENTUM, **options)


def features_of(seen, images):
    network = seen.model
    with torch.no_grad():
        return torch.nn.Sequential(*list(network)[:7])(2 * images - 1)[0].double()


@pytest.mark.parametrize("options, off", [({}, 1e-4), ({"local_steps": 3}, 0.02)])
def test_it_is_near_the_input_of_the_first_linear_layer(options, off, face):
    seen = client(face, **options)
    name, h = leading.features(seen)
    truth = features_of(seen, face[0])
    assert name == "7" and float((h - truth).norm() / truth.norm()) < off


def test_an_attack_on_one_step_sees_a_client_of_several(face):
    seen = client(face, local_steps=3)
    with pytest.raises(ValueError, match="no stack|shows its input"):
        weighted(seen, max_steps=1)
    found = weighted(leading.leading(seen), max_steps=6, num_coordinates=250)
    grey = nearest(face[0], torch.full_like(face[0], 0.5))
    assert int(found.labels) == 3 and nearest(face[0], found.images) > grey + 2


def test_what_was_seen_of_convolutions_stays(face):
    seen = client(face, local_steps=2)
    made = leading.leading(seen)
    assert torch.equal(made.weights_after["0.weight"].float(), seen.weights_after["0.weight"])
    assert torch.linalg.matrix_rank(made.delta_by_name["7.weight"], rtol=1e-9) == 1


def test_without_a_linear_layer_that_moved_it_says_so(face):
    seen = client(face)
    still = dict(seen.weights_after)
    for name, w in seen.model.state_dict().items():
        if name.startswith("7."):
            still[name] = w
    frozen = observe(seen.model, seen.model.state_dict(), still, (3, 32, 32))
    with pytest.raises(ValueError, match="'7' did not move"):
        leading.features(frozen)
