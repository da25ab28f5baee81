"""What an audit prints of a result, and what it concludes, in sentences."""

from collections.abc import Iterator

from dlm_core.beyond import layer_input, weighted
from dlm_core.harness.belief import AGREED, EXPLAINED, PARTLY, Audit, Belief
from dlm_core.harness.look import Look
from dlm_core.harness.plan import tried
from dlm_core.harness.tables import counted
from dlm_core.results import Explains, Reconstruction, SearchEvidence

GRADES = ("explains little of the update", "explains the update in part", "explains the update")


def of_result(found: Reconstruction, belief: Belief) -> Iterator[str]:
    """What to print of a result, line by line.

    Parameters
    ----------
    found, belief
        The result, and how far it is believed.
    """
    if found.evidence.verdict is not None:  # its loss is the chi2/N that the verdict names
        yield found.evidence.verdict
        if belief.grade is Explains.LITTLE:
            return
        if belief.judged and not found.vouched.any():
            yield "it vouches for none of its pictures: none need be an image of the client"
    searched = isinstance(found.evidence, SearchEvidence)
    if searched:
        loss = found.evidence.loss
        size = int(loss <= EXPLAINED) + int(loss <= PARTLY)
        yield (
            f"{GRADES[size]}: loss {loss:.3g} after {found.evaluations} evaluations; "
            f"{found.status.sentence}"
        )
        if belief.agreement is not None or not isinstance(found.evidence, weighted.Told):
            yield _agreed(belief.agreement)
    if isinstance(found.evidence, weighted.Told) and belief.grade is not Explains.LITTLE:
        yield _worth(found, belief)
    # what explains little of the update is no estimate of the client
    little = searched and found.evidence.loss > PARTLY
    unsure = little or (belief.judged and belief.doubt is not None)
    if (found.labels >= 0).all() and not unsure:
        yield f"labels {found.labels.tolist()}"
    simulated = searched and not unsure and found.local_steps is not None
    if found.learning_rate and (simulated or found.evidence.verdict is not None):
        yield f"learning rate {found.learning_rate:.6g}, {_resting_on(found, belief)}"
    if found.weight_decay and found.evidence.verdict is not None:
        yield _decay(found.weight_decay, found.learning_rate)
    if simulated:
        yield (
            f"local steps {found.local_steps} (where later ones hardly move the weights, "
            "other numbers explain it as well)"
        )
    if belief.doubt is not None:
        yield f"not believed: {belief.doubt}"


def _resting_on(found: Reconstruction, belief: Belief) -> str:
    """What a learning rate rests on: the loss, whose factor is one of it, and the images in a step,
    of whose losses the client takes the mean, where there may be more than were found.
    """
    count = len(found.images)
    said = "if the loss is plain cross-entropy"
    sure = count == 1 and belief.grade is Explains.FULLY
    return said if sure else f"{said} and a step had {counted(count, 'image')} and no more"


def _decay(weight_decay: float, learning_rate: float | None) -> str:
    """λ; or the factor of all weights, where that is none that decay leaves."""
    shrunk = weight_decay * (learning_rate or 0.0)
    if 0 <= shrunk < layer_input.SHRUNK:
        return f"weight decay {weight_decay:.3g}"
    return f"beside the step all weights were scaled by {1 - shrunk:.3g}, which is no weight decay"


def _agreed(agreement: float | None) -> str:
    if agreement is None:
        return "no search from another start speaks for its picture"
    which = "the same" if agreement >= AGREED else "another"
    between = f"({agreement:.0f} dB between the two)"
    return f"a search from another start ends at {which} picture {between}"


def _worth(found: Reconstruction, belief: Belief) -> str:
    """What a picture is worth that the update tells in part: up to 8 dB less where its search had
    stalled, on 20 images of CIFAR-100 and the tutorials' network.
    """
    open_ = found.evidence.loss > EXPLAINED
    astray = f", less if its search went astray, which a loss above {EXPLAINED:g} leaves open"
    return (
        f"the update tells about {found.directions:,.0f} of the {found.images.numel():,} "
        "directions of an image there, smooth images' mean fills in the rest: about "
        f"{belief.expected:.0f} dB are expected of its picture{astray if open_ else ''}"
    )


def conclude(found: Audit, best: str, attack: str) -> None:
    """Print what an audit concludes from its best result.

    Parameters
    ----------
    found, best
        What was found, and the key of the best result.
    attack
        That was asked for.
    """
    if found.beliefs[best].grade is Explains.FULLY:
        print("it explains the update: what it shows has leaked")
        return
    mixed = [each for each in found.look.shown if each not in found.look.leaked]
    if found.leaks:
        print(f"what stands in the update has leaked: {'; '.join(map(str, found.leaks))}")
    if mixed:
        print(f"what stands in it, of one image or mixed of several: {'; '.join(mixed)}")
    print(
        "of an image that is no proof, nor a proof that none leaks: look at the picture. "
        "Each attack is for one kind of client,"
    )
    print(
        f"here with {counted(len(found[best].images), 'image')} in the step "
        f"(--num-images, num_images), and some need an nn.Sequential; {_range(found.look)}"
    )
    if found.look.swapped:
        print("and the files look as if they had changed places")
    if attack != "all":
        print("others to try, by what the client did:")
        print(
            *(
                f"  --attack {name:13} {record.client}"
                for name, record in tried().items()
                if name != attack
            ),
            sep="\n",
        )


def _range(look: Look) -> str:
    """What the searches assume of the client's pixels."""
    if look.normalisation is not None:
        return f"searches look for pixels in [0, 1] before {look.normalisation}, as told"
    return (
        "searches look for pixels in [0, 1] that go into the network as they are: a client that "
        "normalises them is not reached unless --normalise (normalise) tells how"
    )
