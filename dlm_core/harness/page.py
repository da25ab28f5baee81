"""An audit as one page of HTML for whoever decides: the verdict in words, the pictures, what was
tried and what was not. It needs no network and runs nothing; text from files is escaped.
"""

import base64
import html
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dlm_core import check, records
from dlm_core.harness import pictures
from dlm_core.harness.about import Snapshot
from dlm_core.harness.account import numbers
from dlm_core.harness.belief import Audit, Belief, Verdict
from dlm_core.results import Explains, Reconstruction

SIDE = 192  # pixels of a picture's width, about
MOST = 16  # pictures of one attack

SOURCE = (
    "V. Carletti, P. Foggia, C. Mazzocca, G. Parrella and M. Vento, SoK: Gradient Inversion "
    "Attacks in Federated Learning, 34th USENIX Security Symposium, 2025, pages 6439 to 6459"
)
ADDRESS = "https://www.usenix.org/conference/usenixsecurity25/presentation/carletti"

# Letters, names and what each adversary has, after the table of SOURCE; what this audit did.
IN_PART = "in part: what it was told of the training (below), or recognised in the update"
NO_DATA = "not tried: it uses no images like the client's"
PASSIVE = "not tried: it reads the files as they are"
THREATS = (
    ("A", "eavesdropper", "the model's updates", "tried: what stands in them"),
    ("B", "informed eavesdropper", "A, and basic knowledge", "tried: all attacks above"),
    ("C", "parameter-aware eavesdropper", "B, and details of the training", IN_PART),
    ("D", "data-enhanced eavesdropper", "C, and surrogate data", NO_DATA),
    ("E", "statistical-informed eavesdropper", "D, and the distribution of clients' data", NO_DATA),
    ("F", "active manipulator", "C, and manipulates the training", PASSIVE),
    ("G", "data-enhanced manipulator", "F, and surrogate data", PASSIVE),
    ("H", "active client manipulator", "G, and selects the clients", PASSIVE),
)
THREAT = (
    "Whoever holds the two files: the server, or a reader of the channel, who follows the protocol "
    "and is curious. It knows the network and the images' shape, takes images for smooth and for "
    "numbers in [0, 1] unless a normalisation is told, and is told no learning rate."
)

STYLE = """
body { font: 16px/1.5 sans-serif; color: #222; max-width: 58em; margin: 2em auto }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3em .8em .3em 0 }
th, td { border-bottom: 1px solid #e4e4e4 }
td { overflow-wrap: anywhere }
.verdict { border-left: .5em solid #555; padding: .6em 1em; background: #f4f4f4 }
.verdict strong { font-size: 1.3em; display: block }
.leaked { border-color: #b00020 } .partly { border-color: #c77700 }
img { image-rendering: pixelated; margin: .3em .5em .3em 0; border: 1px solid #ccc }
"""


@check.arguments
def page(found: Audit) -> str:
    """An audit as HTML, with all that belongs to it inside.

    Parameters
    ----------
    found
        As ``audit.audit`` returns it.

    Returns
    -------
    str
        The page; threat models are named by the letters of Carletti et al., USENIX Security 2025.
    """
    kind = str(found.verdict).replace(" ", "-")
    body = [
        "<h1>Does this client leak?</h1>",
        f'<p class="verdict {kind}"><strong>{_text(str(found.verdict).capitalize())}</strong>'
        f"{_text(found.sentence)}</p>",
        *(["<p>The audit was interrupted; this is what it had found.</p>"] * found.interrupted),
        *_section("What leaked, and how exactly", _leaks(found)),
        *_section("What was looked at", _looked(found)),
        *_section("What was tried", _tried(found)),
        *_section("What was not tried", _untried(found)),
        *_section("Against whom", _threats()),
        *_section("Files and software", _about(found)),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Audit: {_text(found.verdict)}</title><style>{STYLE}</style>"
    )
    joined = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{joined}\n</body></html>\n'
    )


def write(found: Audit, path: str | Path) -> None:
    """Write ``page`` of an audit; OSError where the disk does not take it."""
    Path(path).write_text(page(found), encoding="utf-8")


def _section(title: str, content: Iterable[str]) -> Iterator[str]:
    yield f"<h2>{title}</h2>"
    yield from content


def _leaks(found: Audit) -> Iterator[str]:
    rows = [(each.what, _number(each.error), each.attack, each) for each in found.leaks]
    if rows:
        yield _table(("what", "error", "by which attack", "in words"), rows)
        yield (
            "<p>Errors are root mean squares, of pixels in [0, 1] or relative to a layer's input. "
            "No client's images were known to this audit: an error is computed from the rounding "
            "of the files, from two searches that ended at the same picture, or from what the "
            "update leaves open.</p>"
        )
    elif found.verdict is Verdict.NOTHING_SENT:
        yield "<p>Weights, statistics and whatever else the second file holds are the same.</p>"
    else:
        yield "<p>Nothing that is certain. That is no proof that nothing leaks.</p>"


def _looked(found: Audit) -> Iterator[str]:
    yield "<p>The difference of the two files, before any attack:</p>"
    yield _list(found.look.sentences)
    if found.notes:
        yield "<p>And this was noted:</p>"
        yield _list(found.notes)


def _tried(found: Audit) -> Iterator[str]:
    if not found:
        yield "<p>No attack came to a result.</p>"
    for name, result in found.items():
        belief = found.beliefs[name]
        yield f"<h3>{_text(name)}</h3>"
        yield f"<p>It is for this client: {_text(records.ATTACKS[name.split(',')[0]].client)}.</p>"
        yield from _pictures(result)
        yield f"<p>{_text(ruled_out(belief))}</p>"
        counted = [(key, _number(value)) for key, value in numbers(result).items()]
        if belief.agreement is not None:
            counted.append(("dB between two searches", _number(belief.agreement)))
        if belief.expected is not None:
            counted.append(("dB expected of the picture", _number(belief.expected)))
        yield f"<details><summary>Its numbers</summary>{_table(('', ''), counted)}</details>"


def ruled_out(belief: Belief) -> str:
    """What a result rules out, and what it does not.

    Parameters
    ----------
    belief
        Of one attack, as an audit has it.
    """
    if belief.grade is Explains.FULLY:
        return (
            "It explains the update. Ruled out: that the files keep these images to themselves. "
            "Not ruled out: that more images were in the round, which left no trace in this update."
        )
    if belief.doubt is not None:
        return f"Nothing is ruled out. It is not believed: {belief.doubt}."
    if belief.grade is Explains.PARTLY:
        return (
            "It explains the update in part. Nothing is ruled out: look at the picture, which may "
            "show the image or a mean of several."
        )
    return (
        "It explains little of the update. Nothing is ruled out: an attack may end in the wrong "
        "place, and other clients send other updates."
    )


def _untried(found: Audit) -> Iterator[str]:
    yield "<p>A client that leaks to one of these is not recognised by this audit:</p>"
    yield _table(
        ("attack", "why it was not tried"), [(each.what, each.why) for each in found.untried]
    )


def _threats() -> Iterator[str]:
    yield f"<p>{THREAT}</p>"
    yield (
        f'<p>By the letters of <a href="{ADDRESS}">Carletti et al.</a> [1], each adversary with '
        "what it has:</p>"
    )
    rows = [(f"{letter} [1]", *others) for letter, *others in THREATS]
    yield _table(("", "adversary", "it has", "in this audit"), rows)
    yield f"<p>[1] {SOURCE}.</p>"


def _about(found: Audit) -> Iterator[str]:
    if found.about is None:
        yield "<p>Not known.</p>"
        return
    rows: list[tuple[Any, ...]] = []
    for which in ("before", "after"):
        given: Snapshot = getattr(found.about, which)
        rows.append((f"{which} the round", given.name))
        rows += [(f"SHA-256 of {name}", digest) for name, digest in given.digests.items()]
    rows += [(f"asked: {name}", value) for name, value in found.about.asked.items()]
    rows += [*found.about.versions.items(), ("date (UTC)", found.about.date)]
    yield _table(("", ""), rows)


# --- parts of HTML


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if math.isfinite(value) else "not known"


def _list(lines: Iterable[Any]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    named = "".join(f"<th>{_text(each)}</th>" for each in head)
    cells = ("".join(f"<td>{_text(each)}</td>" for each in row) for row in rows)
    return f"<table><tr>{named}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _pictures(result: Reconstruction) -> Iterator[str]:
    images = result.images.detach().double().cpu()
    said = pictures.shown_as(images)
    if said is not None:
        yield f"<p>{_text(said)}</p>"
    images = pictures.in_range(images)
    for place, image in enumerate(images[:MOST], 1):
        for channels in [image] if len(image) in (1, 3) else image[:MOST, None]:
            data = base64.b64encode(_png(channels)).decode("ascii")
            yield f'<img alt="reconstruction {place}" src="data:image/png;base64,{data}">'
    if len(images) > MOST:
        yield f"<p>The first {MOST} of {len(images)} images.</p>"


def _png(image: torch.Tensor) -> bytes:
    """An image [1 or 3, H, W] in [0, 1], enlarged, as a file of PNG."""
    from torchvision.transforms.functional import to_pil_image

    factor = max(1, SIDE // image.shape[-1])
    large = image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    buffer = io.BytesIO()
    to_pil_image((large * 255).round().to(torch.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
