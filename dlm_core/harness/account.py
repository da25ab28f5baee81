"""All that an audit says, as plain numbers and words: for a file of JSON, a check of a federation's
own, a table.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dlm_core import check, records
from dlm_core.harness import written
from dlm_core.harness.about import Snapshot
from dlm_core.harness.belief import Audit, attack_of
from dlm_core.results import Reconstruction

SCHEMA = "dlm-audit/1"
# Of a layer: its inputs, and images by them.
PICTURES = {"values", "shared", "image", "images", "faint"}


@check.arguments
def account(found: Audit) -> dict[str, Any]:
    """All that an audit says, of dicts, lists, strings, numbers and None alone.

    Parameters
    ----------
    found
        As ``audit.audit`` returns it.

    Returns
    -------
    dict
        What docs/audit.md says, with None for numbers that are not known.
    """
    about = found.about
    whole = {
        "schema": SCHEMA,
        "verdict": str(found.verdict),
        "exit_status": found.exit_status,
        "interrupted": found.interrupted,
        "sentence": found.sentence,
        "leaks": [_fields(each) for each in found.leaks],
        "tried": [_result(found, name) for name in found.tried],
        "untried": [_fields(each) for each in found.untried],
        "notes": found.notes,
        "first_look": _look(found),
        "asked": dict(about.asked) if about else {},
        "files": {"before": _file(about.before), "after": _file(about.after)} if about else {},
        "date": about.date if about else None,
        "versions": dict(about.versions) if about else {},
    }
    return written.plain(whole)


def write(found: Audit, path: str | Path) -> None:
    """Write ``account`` of an audit as a file of JSON; OSError where the disk does not take it."""
    written.write_json(account(found), path)


def _file(snapshot: Snapshot) -> dict[str, Any]:
    return {"name": snapshot.name, "sha256": dict(snapshot.digests)}


def _look(found: Audit) -> dict[str, Any]:
    look = found.look
    counted = {"images": look.images, "directions": look.directions}
    layers = [{**_fields(each), "sentence": each.sentence} for each in look.layers]
    noisy = [{**_fields(each), "sentence": str(each)} for each in look.noisy]
    read = {"layers": layers, "noisy": noisy, "sentences": list(look.sentences)}
    return {**_fields(look), **counted, **read}


def _result(found: Audit, attack: str) -> dict[str, Any]:
    result, belief = found.results[attack], found.beliefs[attack]
    return {
        "attack": attack,
        "client": records.ATTACKS[attack_of(attack)].client,
        "num_images": len(result.images),
        "explains": belief.grade.name.lower(),
        "doubt": belief.doubt,
        "agreement_db": belief.agreement,
        "expected_db": belief.expected,
        "labels": [None if label < 0 else label for label in result.labels.tolist()],
        "vouched": result.vouched.tolist(),
        "pixels": [float(result.images.min()), float(result.images.max())],
        "numbers": numbers(result),
    }


def numbers(result: Reconstruction) -> dict[str, Any]:
    """Every number and word of a result, the small tensors of its evidence as lists."""
    tensors = {each.name: getattr(result.evidence, each.name) for each in fields(result.evidence)}
    lists = {
        name: value.tolist()
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor) and value.dim() == 1
    }
    return {**result.numbers(), **lists, "evaluations": result.evaluations}


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass but for what shows a layer's inputs: an account is of numbers."""
    names = [each.name for each in fields(value) if each.name not in PICTURES]
    return {name: getattr(value, name) for name in names}
