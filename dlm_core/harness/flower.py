"""A federation of Flower, audited: what a strategy sends to chosen clients, and what comes back,
is kept in a folder; nothing of the training changes.

    strategy = flower.keeping(FedAvg(), "kept", clients=2, rounds=[1, 2])

Then ``python -m dlm_core attack kept``, or audits between the rounds. Tested with the versions of
``TESTED``.
"""

import contextlib
import inspect
import logging
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch

from dlm_core import check
from dlm_core.harness import kept
from dlm_core.harness.audit import audit
from dlm_core.harness.look import sentence
from dlm_core.harness.paths import probe

# Of flwr.
TESTED = ("1.42.0",)
# Its own log, which `flwr run --stream` shows.
LOG = logging.getLogger("flwr")
EVERY = "all"
# Arguments of an audit that the folder and the pair decide.
OURS = ("before", "after", "out")

Strategy = TypeVar("Strategy")
Clients = Annotated[int, check.Range(1)] | Collection[int] | Literal["all"]
Rounds = Collection[int] | Literal["all"]


@check.arguments
def keeping(
    strategy: Strategy,
    folder: str | Path,
    *,
    clients: Clients,
    rounds: Rounds,
    record: str | None = None,
    audits: Mapping[str, Any] | None = None,
) -> Strategy:
    """The same strategy, which from now on keeps what it sends and what comes back.

    Parameters
    ----------
    strategy
        Any of ``flwr.serverapp.strategy``, or of your own. Of one around another, such as those of
        differential privacy, give the outer one: it sees what the clients sent.
    folder
        To keep the snapshots in, as ``kept`` describes; made where it does not exist. They show
        what the clients' images show: only their owner can read them.
    clients
        How many, of those that are sent something first; or their node ids; or "all".
    rounds
        Their numbers, from 1 on; or "all".
    record
        Of the ArrayRecords in a message, the one that has the network's weights; None: the only
        one.
    audits
        Arguments of ``audit.audit``, such as ``{"model": network, "image_shape": (3, 32, 32),
        "minutes": 5}``, to audit after each round, before the next one begins; the minutes are for
        all clients of a round. None: to audit afterwards, by ``dlm attack FOLDER``.

    Returns
    -------
    Strategy
        The object that was given.

    Raises
    ------
    ValueError
        For arguments out of range, and for what is no strategy of messages.
    ModuleNotFoundError
        Where Flower is not installed.

    Notes
    -----
    A snapshot that cannot be written, and an audit that fails, are said in Flower's log, and the
    training goes on. A message with several ArrayRecords, of which ``record`` names none, ends it
    before anything was sent.
    """
    _check_strategy(strategy)
    _check_chosen(clients, rounds)
    options = _checked_audits(audits)
    ours = not Path(folder).exists()
    try:
        probe(Path(folder))
        if ours:
            Path(folder).chmod(0o700)
    except OSError as why:
        raise ValueError(f"folder {str(folder)!r} cannot be written ({why.strerror})") from None
    watch = _Watch(Path(folder), clients, rounds, record, options)
    changed: Any = strategy
    changed.configure_train = watch.sending(changed.configure_train)
    changed.aggregate_train = watch.receiving(changed.aggregate_train)
    return strategy


def _check_strategy(strategy: Any) -> None:
    """Raise ValueError unless it is a strategy of messages, ModuleNotFoundError without Flower."""
    try:
        from flwr.serverapp.strategy import Strategy as Base
    except ModuleNotFoundError as missing:
        if missing.name and missing.name.split(".")[0] != "flwr":
            raise
        raise ModuleNotFoundError(
            f"Flower is not installed for this Python, or older than {TESTED[0]}; "
            "pip install '.[flower]' in a clone of this repository brings it",
            name="flwr",
        ) from None
    if not isinstance(strategy, Base):
        raise ValueError(
            f"strategy is {check.shown(strategy)}; it takes one of flwr.serverapp.strategy, whose "
            "messages it keeps (those of flwr.server.strategy send lists without names)"
        )


def _check_chosen(clients: Clients, rounds: Rounds) -> None:
    """Raise ValueError for a text other than "all", and for what is no number."""
    for name, chosen, lowest in (("clients", clients, 0), ("rounds", rounds, 1)):
        if isinstance(chosen, int) or chosen == EVERY:
            continue
        if isinstance(chosen, (str, bytes, Mapping)) or not chosen:
            raise ValueError(f"{name} is {check.shown(chosen)}; it takes numbers, or {EVERY!r}")
        for each in chosen:
            check.fitting(f"each of {name}", each, Annotated[int, check.Range(lowest)])


def _checked_audits(audits: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The audits' arguments; ValueError where one is unknown, or decided by the folder."""
    if audits is None:
        return None
    known = [name for name in inspect.signature(audit).parameters if name not in OURS]
    for name in audits:
        check.one_of("argument of audits", name, known)
    check.named(audit, audits)
    return dict(audits)


class _Watch:
    """What is kept of a strategy's messages."""

    def __init__(
        self,
        folder: Path,
        clients: Clients,
        rounds: Rounds,
        record: str | None,
        audits: dict[str, Any] | None,
    ) -> None:
        self.folder, self.clients, self.rounds = folder, clients, rounds
        self.record, self.audits = record, audits
        self.met: list[int] = []  # clients that were chosen by being first
        self.sent: dict[int, Mapping[str, Any]] = {}  # of this round, by client

    def sending(self, configure: Callable[..., Iterable[Any]]) -> Callable[..., list[Any]]:
        """``configure_train`` that notes what it sends."""

        def noted(server_round: int, *arguments: Any, **named: Any) -> list[Any]:
            messages = list(configure(server_round, *arguments, **named))
            self.sent = {}
            if self.rounds == EVERY or server_round in self.rounds:
                for message in messages:
                    client = message.metadata.dst_node_id
                    if self._chosen(client):
                        self.sent[client] = dict(self._weights(message))
            return messages

        return noted

    def receiving(self, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        """``aggregate_train`` that keeps what came back, and audits it."""

        def kept_and_aggregated(server_round: int, replies: Iterable[Any]) -> Any:
            replies = list(replies)
            pairs = list(self._keep(server_round, replies)) if self.sent else []
            self.sent = {}
            aggregated = aggregate(server_round, replies)
            if pairs and self.audits is not None:
                self._audit(pairs, self.audits)
            return aggregated

        return kept_and_aggregated

    def _chosen(self, client: int) -> bool:
        if not isinstance(self.clients, int):
            return self.clients == EVERY or client in self.clients
        if client not in self.met and len(self.met) < self.clients:
            self.met.append(client)
        return client in self.met

    def _weights(self, message: Any) -> Mapping[str, Any]:
        """The ArrayRecord of a message; ValueError where it is not known which."""
        records = dict(message.content.array_records)
        if self.record is None and len(records) == 1:
            return next(iter(records.values()))
        if self.record in records:
            return records[self.record]
        raise ValueError(
            f"record is {self.record!r}, and a message has the ArrayRecords {sorted(records)}; "
            "it names the one that has the network's weights"
        )

    def _keep(self, number: int, replies: Iterable[Any]) -> Iterator[kept.Pair]:
        """Write what came back from chosen clients; what cannot be kept is said."""
        for reply in replies:
            client = reply.metadata.src_node_id
            if client not in self.sent or reply.has_error():
                continue
            try:
                sent, back = (_arrays(each) for each in (self.sent[client], self._weights(reply)))
                yield kept.write(self.folder, number, str(client), sent, back, _said(reply))
            except (OSError, ValueError, TypeError, AttributeError) as why:
                LOG.warning("round %s, client %s not kept: %s", number, client, sentence(why))

    def _audit(self, pairs: list[kept.Pair], asked: dict[str, Any]) -> None:
        """Audit one round's pairs, into a file beside them; whatever goes wrong is said."""
        minutes = asked.get("minutes")
        options = {name: value for name, value in asked.items() if name != "minutes"}
        try:
            said = pairs[0].after.with_name("audits.txt")
            with (
                said.open("w", encoding="utf-8") as file,
                _aside(),
                contextlib.redirect_stdout(file),
            ):
                done = kept.audits(pairs, minutes=minutes, asked=options)
        except Exception as why:
            LOG.warning("round %s not audited: %s", pairs[0].number, sentence(why))
            return
        for each in done:
            LOG.info("%s: %s", each.pair, each.verdict)


def _arrays(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An ArrayRecord as arrays."""
    return {name: each.numpy() for name, each in record.items()}


def _said(reply: Any) -> dict[str, Any]:
    """The numbers that a reply has beside its weights."""
    return {
        name: value
        for each in reply.content.metric_records.values()
        for name, value in each.items()
    }


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Within it, what draws random numbers or sets torch's threads leaves those of the training."""
    drawn = torch.get_rng_state(), np.random.get_state(), random.getstate()
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_rng_state(drawn[0])
        np.random.set_state(drawn[1])
        random.setstate(drawn[2])
        torch.set_num_threads(threads)
