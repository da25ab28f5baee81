"""A trial is a value, and running it is a pure function of it."""

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dlm_core import attacks, check, coordinates, data, defenses, federated, metrics, models, optimizers, search
from dlm_core.beyond import adaptive, batches, exact, normalisation, protocols, signlike


def grey(seen, *, num_images=1, seed=0):
    """The trivial baseline: a mid-grey image, the best guess of an observer who looks at nothing."""
    images = torch.full((num_images, *seen.image_shape), 0.5)
    return search.Reconstruction(images, torch.zeros(num_images, dtype=torch.int64), [], float("nan"), "baseline", None, 0.0)


def noise(seen, *, num_images=1, seed=0):
    """The other one: uniform noise in [0, 1]."""
    images = torch.rand((num_images, *seen.image_shape), generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(grey(seen, num_images=num_images), images=images)


def of_one_image(recovery):
    """``recovery``, which takes one image and has nothing random, to be called as the attacks are."""

    @functools.wraps(recovery)
    def called(seen, *, num_images=1, seed=0, **options):
        if num_images != 1:
            raise ValueError(f"num_images is {num_images}; this attack takes one: exact_batch and dlm_plus take several")
        return recovery(seen, **options)

    return called


ATTACKS = {
    "grey": grey,
    "noise": noise,
    "dlg": attacks.dlg,
    "idlg": attacks.idlg,
    "inverting_gradients": attacks.inverting_gradients,
    "dlm": attacks.dlm,
    "dlm_plus": attacks.dlm_plus,
    "unrolled_dlm": attacks.unrolled_dlm,
    "exact": of_one_image(exact.recover),
    "aware_dlm_plus": adaptive.dlm_plus,
    "aware_exact": of_one_image(adaptive.recover),
    "aware_combined": adaptive.combined,
    "aware_unrolled_dlm": adaptive.unrolled_dlm,
    "exact_batch": batches.recover_batch,
    "interval_dlm": signlike.interval_dlm,
    "sign_dlm": signlike.sign_dlm,
    "statistics": normalisation.reconstruct,
}
DEFENCES = {name: getattr(defenses, name) for name in ("noise", "sparsify", "clip_and_noise", "top_k", "quantise")}
PROTOCOLS = {
    name: getattr(protocols, name) for name in ("fedsgd", "aggregate", "rounds", "data_parallel", "gossip", "two_hops")
}
DEFENDED = ("aggregate", "rounds")  # the protocols whose clients may defend what they send
# Names that stand for functions inside attack_options and client, so that a trial stays plain data.
PARTS = {
    "pixels": coordinates.pixels,
    "cosines": coordinates.cosines,
    "lbfgs": optimizers.lbfgs,
    "released_lbfgs": optimizers.released_lbfgs,
    "adam": optimizers.adam,
    "signed_adam": optimizers.SignedAdam,
}
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
OPTIMIZERS = {name.lower(): getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "RMSprop")}
PROFILES = ("smoke", "quick", "paper")


@dataclass(frozen=True)
class Trial:
    """One client, one observation, one attack: plain data, so that it can be compared, stored and sent to a worker.

    dataset, source  of ``data.load``.            index    of the first image.      batch    images per client, from index on.
    model            of ``models.build``, with ``model_options``.
    trained          FedAvg rounds the model went through before, on images of the data set that are not attacked.
    client           keyword arguments of ``federated.train_locally`` ("optimizer" by lower-case name), and "dtype", in
                     which it computes, and "mode": "eval" where it leaves batch norm's running statistics alone.
    attack           a key of ATTACKS, with ``attack_options``; "labels": "given" tells it the true labels, and an attack
                     whose name begins with "aware" is told the defence, but not its noise.
    defence          {} or {"name": a key of DEFENCES, …} with the keyword arguments of ``defenses.defend``.
    protocol         {} for FedAvg, whose server sees one client; or {"name": a key of PROTOCOLS, "others": number of clients
                     that are not attacked, …} with its keyword arguments. Each client then has one image, others those
                     after the attacked ones. A defence goes with those in DEFENDED alone.
    seed             of the model's weights, the attack's start and the defence's noise.
    """

    attack: str = "dlm_plus"
    attack_options: dict = field(default_factory=dict)
    dataset: str = "cifar100"
    source: str = "bundled"
    index: int = 0
    batch: int = 1
    model: str = "lenet"
    model_options: dict = field(default_factory=dict)
    trained: int = 0
    client: dict = field(default_factory=lambda: {"lr": 0.01})
    defence: dict = field(default_factory=dict)
    protocol: dict = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        check.one_of("attack", self.attack, ATTACKS)
        check.one_of("model", self.model, models.NETWORKS)
        check.one_of("data set", self.dataset, data.NAMES)
        check.at_least("index", self.index, 0)
        check.at_least("batch", self.batch, 1)
        check.at_least("seed", self.seed, 0)
        check.at_least("trained", self.trained, 0)
        check.in_range("lr", self.client.get("lr"), 0, float("inf"), open_low=True)
        if self.defence or self.attack.startswith("aware"):
            check.one_of("defence", self.defence.get("name"), DEFENCES)
        for part in ("optimizer", "coordinates"):
            if part in self.attack_options:
                check.one_of(part, self.attack_options[part], PARTS)
        if self.protocol:
            check.one_of("protocol", self.protocol.get("name"), DEFENDED if self.defence else PROTOCOLS)
        if "optimizer" in self.client:
            check.one_of("client optimizer", self.client["optimizer"], OPTIMIZERS)
        for options in (self.client, self.attack_options):
            for name in {"dtype", "transmitted"} & options.keys():
                check.one_of(name, options[name], DTYPES)
        check.one_of("mode", self.client.get("mode", "train"), ("train", "eval"))

    @property
    def key(self):
        """Names the trial's result."""
        return result_key(self, "trials")

    def __hash__(self):
        return hash(self.key)

    def run(self):
        """``run_trial`` of it: what a sweep calls."""
        return run_trial(self)


def result_key(value, module):
    """Names the result of a trial or the like: a digest of the value and of the code (from ``module`` on) and data behind it."""
    described = json.dumps([asdict(value), code_version(module), data.digest(value.dataset)], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def observe(trial):
    """The client's side of a trial: returns (Observation after the defence, true images, true labels)."""
    truth = data.load(trial.dataset, indices=range(trial.index, trial.index + trial.batch), source=trial.source)
    same = dataclasses.replace(trial, attack="grey", attack_options={}, client={"lr": 1.0}, defence={}, protocol={})
    model = copy.deepcopy(received(same))
    client = dict(trial.client)
    if "optimizer" in client:
        client["optimizer"] = OPTIMIZERS[client["optimizer"]]
    if "transmitted" in client:
        client["transmitted"] = DTYPES[client["transmitted"]]
    dtype = DTYPES[client.pop("dtype", "float32")]
    model.train(client.pop("mode", "train") == "train")
    if trial.protocol:
        return take_part(trial, model.to(dtype), client), truth.images, truth.labels
    seen = federated.train_locally(model.to(dtype), truth.images.to(dtype), truth.labels, **client)
    return defend(trial, seen), truth.images, truth.labels


def defend(trial, seen, turn=0, client=0):
    """What the trial's defence leaves of an Observation, with its own noise for each round ``turn`` and each client."""
    if not trial.defence:
        return seen
    options = dict(trial.defence)
    return defenses.defend(seen, DEFENCES[options.pop("name")], seed=trial.seed + 101 * turn + 1009 * client, **options)


def take_part(trial, model, client):
    """The Observation that the trial's protocol leaves to its observer; of "rounds" a list of them."""
    options = dict(trial.protocol)
    protocol, last = PROTOCOLS[options.pop("name")], trial.index + trial.batch + options.pop("others", 0)
    everyone = data.load(trial.dataset, indices=range(trial.index, last), source=trial.source)
    clients = list(zip(everyone.images.to(next(model.parameters())).split(1), everyone.labels.split(1)))
    if trial.defence:
        options["defend"] = functools.partial(defend, trial)
    return protocol(model, clients, **options, **client)


@functools.lru_cache(maxsize=4)
def received(trial):
    """The model that the client receives, trained or not; trials that differ in client, attack or defence share it."""
    truth = data.load(trial.dataset, indices=[trial.index], source=trial.source)
    model = models.build(trial.model, truth.images.shape[1:], truth.num_classes, seed=trial.seed, **trial.model_options)
    return train(model, trial) if trial.trained else model


def train(model, trial):
    """``model`` after ``trial.trained`` rounds of FedAvg: 5 clients, up to 1,000 images, 10 Adam steps of 32 images each."""
    everything = data.load(trial.dataset, source=trial.source)
    attacked = range(trial.index, trial.index + trial.batch)
    others = [i for i in range(min(len(everything.labels), 1000 + trial.batch)) if i not in attacked]
    clients = [(everything.images[others[c::5]], everything.labels[others[c::5]]) for c in range(5)]
    settings = {"lr": 0.01, "steps": 10, "batch_size": 32, "optimizer": torch.optim.Adam}
    *_, (model, _) = federated.rounds(model, clients, number=trial.trained, **settings)
    return model


def attack(trial, seen, labels):
    """The observer's side: ``labels`` are used only where the trial says that the attack is told them."""
    parts = {"optimizer": PARTS, "coordinates": PARTS, "transmitted": DTYPES, "dtype": DTYPES}
    options = {name: parts[name][value] if name in parts else value for name, value in trial.attack_options.items()}
    if options.get("labels") == "given":
        options["labels"] = labels
    if trial.attack.startswith("aware"):
        options["defence"] = trial.defence
    return ATTACKS[trial.attack](seen, seed=trial.seed, num_images=trial.batch, **options)


def run_trial(trial):
    """Return the trial's record: a dict of plain numbers and strings, and under "arrays" tensors (images, losses, history).

    Bit-identical on one machine for any number of workers: it runs on one torch thread. A client or an attack that diverges
    numerically is a result, not an error: its record says "client diverged", "diverged" or "attack singular"; so is a client
    whose weights do not change ("client unchanged").
    """
    with one_thread():
        try:
            seen, images, labels = observe(trial)
        except FloatingPointError:
            return {"stop_reason": "client diverged", "arrays": {}}
        except federated.Unchanged:
            return {"stop_reason": "client unchanged", "arrays": {}}
        try:
            found = attack(trial, seen, labels)
        except torch.linalg.LinAlgError:  # a defence may leave too little for exact recovery's equations
            return {"stop_reason": "attack singular", "arrays": {}}
        return {**judge(found, images, labels), "arrays": arrays(found)}


def judge(found, images, labels):
    """A reconstruction's own numbers, and how it compares with the truth; images of a batch are matched first.

    This is the only place where truth enters.
    """
    order = metrics.match(found.images, images) if len(images) > 1 else torch.tensor([0])
    best = found.images[order]
    psnrs = metrics.psnr(best, images, data_range=1.0, per_image=True)
    wide = min(images.shape[-2:]) >= 32  # what LPIPS' network and the released SSIM's window take
    history = [float(metrics.psnr(then[order], images, data_range=1.0)) for _, then in found.history]
    numbers = {name: value for name, value in vars(found).items() if isinstance(value, (int, float, str))}
    return {
        **numbers,
        "psnr": float(psnrs.mean()),
        "psnrs": psnrs.tolist(),
        "ssim": float(metrics.ssim(best, images, data_range=1.0)),
        "lpips": float(metrics.lpips(best, images, data_range=1.0)) if wide else None,
        "exact_pixels": float(metrics.exact_pixel_rate(best, images)),
        "released_psnr": float(metrics.released_psnr(best, images)),
        "released_ssim": float(metrics.released_ssim(best, images)) if wide else None,
        "labels_right": sorted(found.labels.tolist()) == sorted(labels.tolist()),
        "evaluations": found.evaluations,
        "k": found.k,
        "history_evaluations": [evaluation for evaluation, _ in found.history],
        "history_psnr": history,
    }


def arrays(found):
    """The reconstruction's tensors in single precision, for figures."""
    kept = {"images": found.images.float(), "losses": torch.tensor(found.losses)}
    if found.ks:
        kept["ks"] = torch.tensor(found.ks)
    if found.history:
        kept["history"] = torch.stack([images for _, images in found.history]).float()
    return {name: tensor.contiguous().cpu() for name, tensor in kept.items()}


@functools.cache
def code_version(module):
    """Digest of a dlm_core module and of those it imports, comments and docstrings aside: a new result needs a new name."""
    seen, todo, parts = set(), [module], [torch.__version__]
    while todo:
        name = todo.pop()
        if name in seen or not (path := Path(__file__).with_name(f"{name}.py")).exists():
            continue
        seen.add(name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if (
                isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node, clean=False) is not None
            ):
                node.body = node.body[1:]
        todo += imported(tree)
        parts.append(f"{name}:{ast.dump(tree)}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16]


def imported(tree):
    """The modules of dlm_core that a module, given as its syntax tree, imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "dlm_core":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dlm_core."):
            found.add(node.module.split(".")[1])
    return found


@contextlib.contextmanager
def one_thread():
    """Sums depend on how they are split among threads; one thread gives the same bits everywhere on a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
