"""Snapshots kept of a federation, in one folder: for each client and round what the server sent it
and what came back, with their digests; and the audits of all of them.

In ``FOLDER/round-1/`` lie

- ``sent-0123456789ab.safetensors``: what was sent, once where several clients were sent the same;
- ``client-7.safetensors``: what came back from client 7;
- ``client-7.json``: round, client, both files with their digests, and what the client said;
- ``audit-7.json``, ``.html`` and ``.png``, of an audit.

What is kept shows what the clients' images show: the folder is readable by its owner alone.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from dlm_core import check
from dlm_core.harness import account, page, written
from dlm_core.harness.audit import audit
from dlm_core.harness.belief import Audit, Verdict
from dlm_core.harness.look import sentence
from dlm_core.harness.paths import write_atomically
from dlm_core.harness.tables import counted

SCHEMA = "dlm-kept/1"
SHORT = 12  # digits of a digest in a file's name
# Of a verdict in a folder: the first that one of its clients has.
WORST = (Verdict.LEAKED, Verdict.PARTLY, Verdict.NOT_SHOWN, Verdict.NOTHING_SENT)
# Minutes that an audit is given where none are left: it looks, and leaves its searches out.
LEAST = 1e-3


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What one client received in a round, and what it sent back.

    Attributes
    ----------
    number
        Of the round, from 1 on.
    client
        Its name in the federation.
    before, after
        Files of W_t and W_{t+1}.
    said
        {name: number} that it sent beside its weights.
    """

    number: int
    client: str
    before: Path
    after: Path
    said: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"round {self.number}, client {self.client}"

    def beside(self, suffix: str) -> Path:
        """The file of its audit with this suffix."""
        return self.after.with_name(f"audit-{self.client}{suffix}")


@dataclass(frozen=True, kw_only=True)
class Audited:
    """One pair's audit.

    Attributes
    ----------
    pair
        The snapshots.
    found
        What the audit found; None where there was none.
    why
        Why there was none.
    """

    pair: Pair
    found: Audit | None
    why: str = ""

    @property
    def verdict(self) -> str:
        """In words, with what leaked: "partly: input of layer 'fc1', label"."""
        if self.found is None:
            return f"not audited: {self.why}"
        leaked = ", ".join(dict.fromkeys(each.what for each in self.found.leaks))
        return f"{self.found.verdict}: {leaked}" if leaked else str(self.found.verdict)


def write(
    folder: Path,
    number: int,
    client: str,
    sent: Mapping[str, np.ndarray],
    back: Mapping[str, np.ndarray],
    said: Mapping[str, Any],
) -> Pair:
    """Keep one pair of snapshots.

    Parameters
    ----------
    folder
        That exists.
    number, client
        Of the round, from 1 on, and the client's name: letters, digits, "-" and "_".
    sent, back
        {name: array} of W_t and W_{t+1}.
    said
        What the client sent beside them, of numbers and lists of numbers.

    Raises
    ------
    OSError
        Where the disk does not take it.
    """
    place = folder / f"round-{number}"
    place.mkdir(mode=0o700, exist_ok=True)
    content = _bytes(sent)
    before = place / f"sent-{_digest(content)[:SHORT]}.safetensors"
    if not before.exists():
        write_atomically(before, content)
    came = _bytes(back)
    after = place / f"client-{client}.safetensors"
    write_atomically(after, came)
    pair = Pair(number=number, client=client, before=before, after=after, said=dict(said))
    noted = {
        "schema": SCHEMA,
        "round": number,
        "client": client,
        "before": {"file": before.name, "sha256": _digest(content)},
        "after": {"file": after.name, "sha256": _digest(came)},
        "said": dict(said),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    # Last: where it stands, the pair is whole.
    text = json.dumps(noted, indent=1, ensure_ascii=False)
    write_atomically(after.with_suffix(".json"), text + "\n")
    return pair


def _bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """As safetensors, which take arrays in C's order and this machine's bytes."""
    own = {name: np.array(each, order="C") for name, each in arrays.items()}
    return save({name: each.astype(each.dtype.newbyteorder("=")) for name, each in own.items()})


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def holds(folder: str | Path) -> bool:
    """Whether there are kept snapshots in it."""
    return next(_records(Path(folder)), None) is not None


def _records(folder: Path) -> Iterator[Path]:
    """Its pairs' files of JSON."""
    for pattern in ("client-*.json", "round-*/client-*.json"):
        yield from folder.glob(pattern)


@check.arguments
def read(folder: str | Path) -> list[Pair]:
    """The pairs that a folder keeps, or one round's folder of it, by round and client.

    Parameters
    ----------
    folder
        As ``flower.keeping`` fills it.

    Raises
    ------
    ValueError
        Where it keeps none, or a file is not the one that was kept.
    """
    pairs = [_pair(path) for path in _records(Path(folder))]
    if not pairs:
        raise ValueError(f"folder is {str(folder)!r}, in which no snapshots were kept")
    return sorted(pairs, key=lambda pair: (pair.number, pair.client.zfill(20)))


def _pair(path: Path) -> Pair:
    """What one file of JSON names; ValueError unless both files have their digests."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        files = [noted["before"], noted["after"]]
        number, client, said = int(noted["round"]), str(noted["client"]), dict(noted["said"])
        places = [path.with_name(Path(each["file"]).name) for each in files]
        digests = [str(each["sha256"]) for each in files]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{str(path)!r} is no note of kept snapshots") from None
    if path.name != f"client-{client}.json":
        raise ValueError(f"{str(path)!r} names another client, {check.shown(client)}")
    for place, digest in zip(places, digests):
        if not place.is_file():
            raise ValueError(f"{str(path)!r} names {place.name!r}, which is not beside it")
        if _digest(place.read_bytes()) != digest:
            raise ValueError(f"{str(place)!r} is not the file that was kept: its digest differs")
    before, after = places
    return Pair(number=number, client=client, before=before, after=after, said=said)


@check.arguments
def audits(
    pairs: Sequence[Pair],
    *,
    minutes: check.Positive | None = None,
    asked: Mapping[str, Any] | None = None,
) -> list[Audited]:
    """Audit kept snapshots, one after the other; print what each shows, and a table of verdicts.
    Picture, page and numbers of each are written beside it.

    Parameters
    ----------
    pairs
        As ``read`` returns them.
    minutes
        That all audits together may take, above 0; each has an equal part of what is left. None for
        ``audit``'s own limit for each.
    asked
        {argument of ``audit.audit``: value}, such as the network and its image_shape.

    Returns
    -------
    list
        One of each pair. A pair that cannot be audited does not end the others; what cannot be
        audited is not said to be safe.
    """
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    done: list[Audited] = []
    for place, pair in enumerate(pairs):
        print(f"{pair}{_said(pair)}", flush=True)
        if done and done[-1].found is not None and done[-1].found.interrupted:
            done.append(Audited(pair=pair, found=None, why="the audit was interrupted"))
            continue
        left = max((end - time.monotonic()) / 60, LEAST) / (len(pairs) - place)
        budget = {} if minutes is None else {"minutes": left}
        try:
            run = {**(asked or {}), **budget, "out": pair.beside(".png")}
            found = audit(pair.before, pair.after, **run)
        except Exception as why:  # whatever a user's network raises, the others are audited
            done.append(Audited(pair=pair, found=None, why=sentence(why)))
            print(f"not audited: {sentence(why)}")
            continue
        for suffix, by in ((".json", account.write), (".html", page.write)):
            written.keep("audit", pair.beside(suffix), partial(by, found))
        done.append(Audited(pair=pair, found=found))
    print("", *_table(done), sep="\n")
    return done


def _said(pair: Pair) -> str:
    """What the client said of itself that is one number."""
    numbers = [f"{name} {v:g}" for name, v in pair.said.items() if isinstance(v, (int, float))]
    return f" ({', '.join(numbers)})" if numbers else ""


def _table(done: Iterable[Audited]) -> Iterator[str]:
    rows = [(f"{each.pair}{_said(each.pair)}", each.verdict) for each in done]
    width = max((len(name) for name, _ in rows), default=0)
    for name, verdict in rows:
        yield f"{name:{width}}  {verdict}"


def verdict(done: Sequence[Audited]) -> Verdict:
    """The worst of several audits; "not shown" at best where a pair was not audited.

    Raises
    ------
    ValueError
        Where none was audited, with the first's reason.
    """
    if all(each.found is None for each in done):
        raise ValueError(f"{counted(len(done), 'pair')} kept, none audited: {done[0].why}")
    met = {each.found.verdict if each.found is not None else Verdict.NOT_SHOWN for each in done}
    return next(each for each in WORST if each in met)


def status(done: Sequence[Audited]) -> int:
    """The exit status of several audits: that of their ``verdict``, 130 where one was
    interrupted.
    """
    worst = verdict(done).exit_status
    interrupted = any(each.found is not None and each.found.interrupted for each in done)
    return 130 if interrupted else worst
