"""The wrapper around Flower's own strategies, messages and mods, in one process: run by the Python
of Flower's environment (tests/harness/test_flower.py).
"""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from flwr.server.strategy import FedAvg as OfLists
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAdam,
    FedAvg,
    FedProx,
)
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from dlm_core import data, flower, kept

IMAGES, LABELS, *_ = data.load("digits", n=40)
NUM_ROUNDS = 3
# Who sends the messages: told by Flower's processes, of which there are none here.
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def client(mods=()):
    """A ClientApp whose node 1 has one image and takes one step; the others take three steps."""
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message, context):
        model, node = network(), context.node_id
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        sent = [w.detach().clone() for w in model.parameters()]
        mine = slice(0, 1) if node == 1 else slice(10 * node - 10, 10 * node)
        run = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(1 if node == 1 else 3):
            run.zero_grad()
            loss = F.cross_entropy(model(IMAGES[mine]), LABELS[mine])
            near = zip(model.parameters(), sent)
            mu = message.content["config"].get("proximal-mu", 0.0)
            (loss + mu / 2 * sum((w - w0).square().sum() for w, w0 in near)).backward()
            run.step()
        numbers = MetricRecord({"loss": loss.item(), "num-examples": 1, "node": node})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": numbers}), reply_to=message)

    return app


class InProcess(Grid):
    """A Grid whose nodes are calls of a ClientApp."""

    run = None

    def __init__(self, app):
        self.app = app

    def get_node_ids(self):
        return [1, 2, 3, 4]

    def send_and_receive(self, messages, *, timeout=None):
        def answered(message):
            node = message.metadata.dst_node_id
            return self.app(message, Context(0, node, {}, RecordDict(), {}))

        return [answered(each) for each in messages]

    def set_run(self, run): ...
    def create_message(self, *arguments, **named): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...


def few(kind, **options):
    return kind(fraction_evaluate=0.0, **options)


STRATEGIES = {
    "FedAvg": (lambda: few(FedAvg), []),
    "FedAvg, half of the clients": (lambda: few(FedAvg, fraction_train=0.5), []),
    "FedProx": (lambda: few(FedProx, proximal_mu=0.5), []),
    "FedAdam": (lambda: few(FedAdam), []),
    "client-side clipping, noise": (
        lambda: DifferentialPrivacyClientSideFixedClipping(few(FedAvg), 0.1, 0.05, 4),
        [fixedclipping_mod],
    ),
    "local differential privacy": (lambda: few(FedAvg), [LocalDpMod(0.05, 1e-3, 10.0, 1e-5)]),
}


def trained(strategy, mods, **keep):
    """The global weights after all rounds, with fixed random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if keep:
        strategy = flower.keeping(strategy, **keep)
    start = ArrayRecord(network().state_dict())
    torch.manual_seed(0)
    found = strategy.start(InProcess(client(mods)), start, num_rounds=NUM_ROUNDS)
    drawn = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
    return {name: each.numpy().tobytes() for name, each in found.arrays.items()}, drawn


AUDITS = {"model": network(), "image_shape": (1, 8, 8), "minutes": 0.02}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_training_is_the_same_bit_by_bit(name, tmp_path):
    make, mods = STRATEGIES[name]
    plain = trained(make(), mods)
    assert trained(make(), mods) == plain, "else nothing is compared"
    every = {"folder": tmp_path / "kept", "clients": "all", "rounds": "all"}
    assert trained(make(), mods, **every) == plain
    audited = {"folder": tmp_path / "audited", "clients": 1, "rounds": [2], "audits": AUDITS}
    assert trained(make(), mods, **audited) == plain
    assert len(kept.read(tmp_path / "audited")) == 1
    assert "verdict" in (tmp_path / "audited" / "round-2" / "audits.txt").read_text()


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_kept_is_what_was_sent_and_what_came_back(name, tmp_path, monkeypatch):
    make, mods = STRATEGIES[name]
    rounds = []
    honest = InProcess.send_and_receive

    def noting(self, messages, **named):
        messages = list(messages)
        replies = honest(self, messages, **named)
        if messages:
            rounds.append(list(zip(messages, replies)))
        return replies

    monkeypatch.setattr(InProcess, "send_and_receive", noting)
    trained(make(), mods, folder=tmp_path, clients="all", rounds="all")
    pairs = {(each.number, each.client): each for each in kept.read(tmp_path)}
    assert len(rounds) == NUM_ROUNDS and len(pairs) == sum(map(len, rounds))
    for number, went in enumerate(rounds, 1):
        for message, reply in went:
            client = str(reply.metadata.src_node_id)
            pair = pairs[number, client]
            assert same(pair.before, message) and same(pair.after, reply)
            assert pair.said["node"] == int(client)


def same(path, message):
    held = load_file(path)
    sent = message.content["arrays"].to_torch_state_dict()
    return set(held) == set(sent) and all(torch.equal(held[n], sent[n]) for n in sent)


def test_the_planted_leak_is_found_and_no_other(tmp_path, capsys, monkeypatch):
    trained(few(FedAvg), [], folder=tmp_path, clients=[1, 3], rounds=[1])
    done = kept.audits(
        kept.read(tmp_path), minutes=0.5, asked={"model": network(), "image_shape": (1, 8, 8)}
    )
    verdicts = {each.pair.client: each.found.verdict for each in done}
    assert verdicts["1"] == "leaked" and verdicts["3"] != "leaked"
    image = done[0].found.results["division"].images
    assert torch.allclose(image[0].float(), IMAGES[0], atol=1e-4)
    assert kept.verdict(done).exit_status == 1


@pytest.mark.parametrize(
    "clients, rounds, held",
    [
        (1, [1], 1),
        (2, "all", 6),
        ([2], {1, 3}, 2),
        ("all", [2], 4),
        ([77], "all", 0),
        ("all", [9], 0),
    ],
)
def test_nothing_is_kept_unless_asked(clients, rounds, held, tmp_path):
    trained(few(FedAvg), [], folder=tmp_path, clients=clients, rounds=rounds)
    assert len(list(tmp_path.rglob("client-*.json"))) == held
    if not held:
        assert not list(tmp_path.iterdir())
    elif isinstance(clients, int):
        assert len({each.client for each in kept.read(tmp_path)}) == clients


def test_a_reply_that_is_an_error_is_not_kept_and_does_not_end_the_training(tmp_path):
    from flwr.app import Error

    class Failing(InProcess):
        def send_and_receive(self, messages, *, timeout=None):
            lost = [Message(Error(0, "gone"), reply_to=each) for each in messages[:1]]
            return [*lost, *super().send_and_receive(messages[1:])]

    strategy = flower.keeping(few(FedAvg), tmp_path, clients="all", rounds=[1])
    strategy.start(Failing(client()), ArrayRecord(network().state_dict()), num_rounds=1)
    assert len(kept.read(tmp_path)) == 3


def test_a_full_disk_is_said_and_the_training_goes_on(tmp_path, monkeypatch, caplog):
    plain = trained(few(FedAvg), [])

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "write_atomically", full)
    flower.LOG.propagate = True
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert trained(few(FedAvg), [], folder=tmp_path, clients=1, rounds=[1]) == plain
    assert "not kept" in caplog.text and "No space left" in caplog.text


def test_an_audit_that_fails_does_not_end_the_training(tmp_path):
    plain = trained(few(FedAvg), [])
    wrong = {"model": "mlp", "image_shape": (1, 9, 9), "minutes": 1}
    keep = {"folder": tmp_path, "clients": 1, "rounds": [1], "audits": wrong}
    assert trained(few(FedAvg), [], **keep) == plain
    assert "not audited" in (tmp_path / "round-1" / "audits.txt").read_text()


def test_several_records_need_a_name(tmp_path):
    class Control(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            messages = list(super().configure_train(server_round, arrays, config, grid))
            for message in messages:
                message.content["control"] = ArrayRecord({"c": arrays["1.bias"]})
            return messages

    start = ArrayRecord(network().state_dict())
    strategy = flower.keeping(few(Control), tmp_path, clients=1, rounds=[1])
    with pytest.raises(ValueError, match="ArrayRecords .'arrays', 'control'.; it names the one"):
        strategy.start(InProcess(client()), start, num_rounds=1)
    named = flower.keeping(few(Control), tmp_path, clients=1, rounds=[1], record="arrays")
    named.start(InProcess(client()), start, num_rounds=1)
    assert len(kept.read(tmp_path)) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strategy": "FedAvg"}, "strategy is 'FedAvg'; it takes one of flwr.serverapp.strategy"),
        ({"strategy": OfLists()}, "it takes one of flwr.serverapp.strategy"),
        ({"clients": 0}, "clients is 0"),
        ({"clients": "some"}, "clients is 'some'"),
        ({"clients": []}, "clients is"),
        ({"clients": [1.5]}, "clients is [1.5]; it takes"),
        ({"rounds": [0]}, "each of rounds is 0; it takes a whole number of at least 1"),
        ({"rounds": 1}, "rounds is 1"),
        ({"audits": {"modle": "mlp"}}, "argument of audits 'modle' is unknown"),
        ({"audits": {"out": "x.png"}}, "argument of audits 'out' is unknown"),
        ({"audits": {"minutes": -1}}, "minutes is -1"),
        ({"folder": __file__}, "cannot be written"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(change, message, tmp_path):
    given = {"strategy": few(FedAvg), "folder": tmp_path / "kept", "clients": 1, "rounds": [1]}
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        flower.keeping(**{**given, **change})


def test_only_the_owner_reads_the_folder(tmp_path):
    trained(few(FedAvg), [], folder=tmp_path / "kept", clients=1, rounds=[1])
    assert all(f.stat().st_mode & 0o077 == 0 for f in (tmp_path / "kept").iterdir())
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    (tmp_path / "theirs").mkdir(mode=0o755)
    (tmp_path / "theirs").chmod(0o755)
    trained(few(FedAvg), [], folder=tmp_path / "theirs", clients=1, rounds=[1])
    assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o755, "a folder that was there stays"
    assert all(f.stat().st_mode & 0o077 == 0 for f in (tmp_path / "theirs").iterdir())
    assert {f.name.split("-")[0] for f in (tmp_path / "kept" / "round-1").iterdir()} == {
        "sent",
        "client",
    }


def test_the_example_s_client_cuts_and_hides_its_update_where_told(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "flower")
    from quickstart import client_app, task

    torch.manual_seed(0)
    start = task.Net().state_dict()

    def moved(clip, noise):
        told = {"many": 32, "clip": clip, "noise": noise}
        content = {"arrays": ArrayRecord(start), "config": ConfigRecord({"server-round": 1})}
        message = Message(RecordDict(content), dst_node_id=1, message_type="train")
        context = Context(0, 1, {"partition-id": 1}, RecordDict(), told)
        back = client_app.app(message, context).content["arrays"].to_torch_state_dict()
        return torch.cat([(back[name] - w).flatten() for name, w in start.items()])

    plain, cut, hidden = moved(0.0, 0.0), moved(1e-3, 0.0), moved(1e-3, 1.0)
    assert plain.norm() > 2e-3 and abs(cut.norm() / 1e-3 - 1) < 1e-2
    assert torch.nn.functional.cosine_similarity(plain, cut, 0) > 0.999
    assert hidden.norm() > 0.1, "the noise is of the clip's size in each of 62,006 weights"


def test_the_version_is_one_that_is_named():
    import flwr

    assert flwr.__version__ in flower.TESTED
