"""Flower's SecAgg+ in one process, and what a server learns that sees only the mean: run by the
Python of Flower's environment (tests/harness/test_flower.py).
"""

import copy

import flwr.compat.common.recorddict_compat as compat
import numpy as np
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import nn
from torch.nn import functional as F

from dlm_core import batches, data
from dlm_core.observation import observe

IMAGES, LABELS, *_ = data.load("digits", n=4)
NODES = [1, 2, 3, 4]
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))


class OneImage(NumPyClient):
    """One step on one image."""

    def __init__(self, number):
        self.mine = slice(number, number + 1)

    def fit(self, parameters, config):
        model = network()
        state = zip(model.state_dict(), map(torch.tensor, parameters))
        model.load_state_dict(dict(state))
        run = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = F.cross_entropy(model(IMAGES[self.mine]), LABELS[self.mine])
        loss.backward()
        run.step()
        return arrays(model), 1, {"loss": loss.item()}


def arrays(model):
    return [w.numpy() for w in model.state_dict().values()]


class InProcess(Grid):
    """A Grid whose nodes are calls of a ClientApp, and that remembers what came back."""

    run = None

    def __init__(self, app):
        self.app, self.replies = app, []
        self.contexts = {node: Context(0, node, {}, RecordDict(), {}) for node in NODES}

    def get_node_ids(self):
        return NODES

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for each in messages:
            each.content = copy.deepcopy(each.content)  # as over a wire
            replies.append(self.app(each, self.contexts[each.metadata.dst_node_id]))
        self.replies.append(replies)
        return replies

    def set_run(self, run): ...
    def create_message(self, *arguments, **named): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...


def secure_mean(**options):
    """(what the server has after a round, what came back to it in each stage)."""
    client = lambda context: OneImage(context.node_id - 1).to_client()  # noqa: E731
    grid = InProcess(ClientApp(client_fn=client, mods=[secaggplus_mod]))
    manager = SimpleClientManager()
    for node in NODES:
        manager.register(GridClientProxy(node_id=node, grid=grid, run_id=1))
    own = Context(1, 0, {}, RecordDict(), {})
    strategy = FedAvg(min_fit_clients=len(NODES), min_available_clients=len(NODES))
    context = LegacyContext(own, ServerConfig(num_rounds=1), strategy, manager)
    records = context.state
    records.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters(arrays(network()))
    records.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, True)
    SecAggPlusWorkflow(3, 2, **options)(grid, context)
    mean = compat.arrayrecord_to_parameters(records.array_records[MAIN_PARAMS_RECORD], True)
    return parameters_to_ndarrays(mean), grid.replies


def error(mean):
    """The largest difference from the mean of what the clients trained."""
    sent = [OneImage(n).fit(arrays(network()), {})[0] for n in range(len(NODES))]
    return max(np.abs(m - np.mean(each, 0)).max() for m, each in zip(mean, zip(*sent)))


def test_a_server_that_sees_only_the_mean_of_four_steps_has_all_four_images():
    mean, _ = secure_mean(max_weight=1.0)
    assert error(mean) < 1e-5
    model = network()
    after = {n: torch.tensor(w).float() for n, w in zip(model.state_dict(), mean)}
    seen = observe(model, model.state_dict(), after, (1, 8, 8))
    found = batches.recover_batch(seen, num_images=4)
    misses = [(found.images - image).square().flatten(1).mean(1).min() for image in IMAGES]
    assert max(misses) < 1e-6, "60 dB"


def test_flower_s_own_max_weight_rounds_the_mean_of_small_clients_to_thousandths():
    assert 1e-3 < error(secure_mean()[0]) < 1e-2


def test_beside_masked_weights_a_client_s_numbers_come_in_the_clear():
    _, (_, _, masked, _) = secure_mean(max_weight=1.0)
    for reply in masked:
        assert all(not len(each) for each in reply.content.array_records.values())
        told = {k: v for each in reply.content.metric_records.values() for k, v in each.items()}
        assert told["num_examples"] == 1
        assert reply.content.config_records["fitres.metrics"]["loss"] > 0
