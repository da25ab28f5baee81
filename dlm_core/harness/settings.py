"""One sentence that says in which setting a notebook's numbers hold, generated from its trials."""

from collections.abc import Iterable
from typing import Any

from dlm_core import check, data, records
from dlm_core.harness import released, tables
from dlm_core.harness.trials import Trial

INITS = {"paper": "the paper's weights", "default": "PyTorch's initial weights"}
# Options that make a search another than ours.
SEARCH = ("optimizer", "coordinates", "dtype")
BASELINES = ("grey", "noise")
# What ``released.search`` says of searches that others published, in a sentence.
WHOLE = {
    released.AS_RELEASED: "the released search",
    released.ALIKE: "the released search",
    released.AUTHORS: "IG's authors' search",
}


@check.arguments
def sentence(trials: Iterable[Any], *, n: str | None = None) -> str:
    """Return "Setting: LeNet with the paper's weights, CIFAR-100 (bundled), one image, …; n = …".

    Parameters
    ----------
    trials
        Of ``trials.Trial``; others, such as trainings for their accuracy, are left out. What
        differs among them is listed.
    n
        What is counted, where the trials do not say it.
    """
    attacked = [t for t in trials if isinstance(t, Trial) and t.attack not in BASELINES]
    if not attacked:
        return f"Setting: n = {n}." if n else ""
    parts = [_networks, _data, _images, _client, _defences, _labels, _search]
    said = [text for text in (part(attacked) for part in parts) if text]
    return f"Setting: {', '.join(said)}; n = {n or _count(attacked)}."


def _listed(values: Iterable[Any], last: str = " or ") -> str:
    """Distinct values in order of appearance, in words."""
    texts = [str(value) for value in dict.fromkeys(values)]
    if len(texts) > 5:
        texts = [*texts[:2], f"{len(texts) - 3} others", texts[-1]]
    return last.join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def _numbers(values: Iterable[float]) -> str:
    """Distinct numbers in ascending order, many of them by their ends."""
    distinct = sorted(set(values))
    if len(distinct) > 5:
        return f"{distinct[0]:g} to {distinct[-1]:g}"
    return _listed(f"{value:g}" for value in distinct)


def _networks(trials: list[Trial]) -> str:
    """Networks of the same initial weights together: "LeNet or MLP with the paper's weights"."""
    inits: dict[str, dict[str, None]] = {}
    for t in trials:
        init = INITS[t.model_options.get("init", "paper")]
        inits.setdefault(records.NETWORKS[t.model].title, {})[init] = None
    named: dict[frozenset[str], list[str]] = {}
    for title, each in inits.items():
        named.setdefault(frozenset(each), []).append(title)
    texts = [f"{_listed(same)} with {_listed(inits[same[0]])}" for same in named.values()]
    trained = [t.trained for t in trials if t.trained]
    if trained:
        texts.append(f"up to {max(trained)} rounds of training")
    return ", ".join(texts)


def _data(trials: list[Trial]) -> str:
    return _listed(
        records.DATA_SETS[t.dataset].title + (f" ({t.source})" if t.dataset in data.NAMES else "")
        for t in trials
    )


def _images(trials: list[Trial]) -> str:
    counts = {t.num_images for t in trials}
    return "one image" if counts == {1} else f"{_numbers(counts)} images"


def _client(trials: list[Trial]) -> str:
    clients = [t.client for t in trials]
    steps = {c.local_steps for c in clients}
    kinds = _listed(records.CLIENT_OPTIMIZERS[c.client_optimizer].title for c in clients)
    rates = _numbers(c.learning_rate for c in clients)
    number = "one step" if steps == {1} else f"{_numbers(steps)} steps"
    protocols = [t.protocol for t in trials if t.protocol is not None]
    shuffled = [each for each in protocols if each.name == "epochs"]
    if len(shuffled) == len(trials):
        epochs = {each.options.get("num_epochs", 1) for each in shuffled}
        number = "one epoch" if epochs == {1} else f"{_numbers(epochs)} epochs"
        sizes = (t.client.batch_size or t.num_images for t in trials)
        kinds += f" on mini-batches of {_numbers(sizes)}"
    precision = _listed(c.transmitted or c.dtype for c in clients)
    return f"{number} of {kinds} at {rates}, {precision}"


def _defences(trials: list[Trial]) -> str:
    defended = [t.defence for t in trials if t.defence is not None]
    noised = any(each.options.get("noise_multiplier") for each in defended)
    names = [
        "clipping" if each.name == "clip_and_noise" and not noised else each.record.title
        for each in defended
    ]
    return f"defended by {_listed(names)}" if names else ""


def _labels(trials: list[Trial]) -> str:
    defaults = dict.fromkeys(("dlg", "dlg_factor"), "optimised")
    asked = [t.attack_options.get("labels", defaults.get(t.attack, "inferred")) for t in trials]
    own = ("inferred", "optimised")
    return "label " + _listed(each if each in own else "told" for each in asked)


def _search(trials: list[Trial]) -> str:
    named = {t.attack for t in trials}
    searching = {key for key in named if "max_evaluations" in records.ATTACKS[key].options}
    searches = [t for t in trials if t.attack in searching]
    others = [records.ATTACKS[t.attack].title for t in trials if t.attack not in searching]
    ours = [t for t in searches if not set(SEARCH) & t.attack_options.keys()]
    ways = [released.search(t).partition(", ") for t in searches]
    whole = [f"{WHOLE[w]} ({cut})" if cut else WHOLE[w] for w, _, cut in ways if w in WHOLE]
    texts = [*(["our search"] if ours else []), *whole]
    if len(ours) + len(whole) < len(searches):
        texts.append(f"{'others' if texts else 'searches'} that the tables name")
    # "exact, batch" and "exact, aware" are one kind
    kinds = (title.split(",")[0] for title in others)
    texts += ["exact recovery" if kind == "exact" else kind for kind in kinds]
    return _listed(texts, " and ")


def _count(trials: list[Trial]) -> str:
    """Images and networks, which are not the same thing."""
    images = len({(t.dataset, t.index + i) for t in trials for i in range(t.num_images)})
    networks = len({(t.model, t.model_options, t.seed) for t in trials})
    attacks = len(set(trials))  # a trial may stand in two plans, and runs once
    counts = {"image": images, "network": networks, "attack": attacks}
    return ", ".join(tables.counted(count, what) for what, count in counts.items())
