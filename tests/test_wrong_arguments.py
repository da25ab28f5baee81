"""Wrong calls of the public functions: each ends in one clear sentence, none goes through.

The calls are generated. ``VALID`` has a valid call of each function; in turn, each of its arguments
is replaced by values that are wrong for its type, its range or its name.
"""

import inspect
import math
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from matplotlib.figure import Figure

import dlm_core
from dlm_core import check
from dlm_core.harness.belief import Audit
from dlm_core.harness.look import Look

# Modules whose functions are called by others of ours alone, on what was checked at the door.
INNER = {
    *(
        "battery",
        "check",
        "contents",
        "front",
        "interrupts",
        "jacobian",
        "keys",
        "lanczos",
        "sources",
        "likelihood",
        "memory",
        "networks",
        "paths",
        "precision",
        "priors",
    ),
    *("reading", "records", "recursion", "registry", "results", "rounding", "scene", "stacks"),
    "threads",
}


@cache
def scene():
    """What valid calls are made of: digits of 8x8 pixels, networks, Observations."""
    from dlm_core import data, defenses, federated, models
    from dlm_core.beyond import starts
    from dlm_core.harness import kept, options, thresholds
    from dlm_core.harness.trials import Trial

    images, labels, *_ = data.load("digits", n=2)
    model = models.build("lenet", (1, 8, 8), 10, seed=3)
    wide = models.build("mlp", (1, 8, 8), 10, seed=3)
    norm = models.build("resnet18_bn", (1, 28, 28), 10, seed=3, width=2, blocks=1)
    large, classes, *_ = data.load("fashion_mnist", n=1)
    step = {"learning_rate": 0.05}
    noise = defenses.Setting("noise", {"scale": 1e-4}, observer="server")
    folder = Path(tempfile.mkdtemp())  # kept for the session
    kept.write(folder, 1, "7", *([{"w": np.zeros(2)}] * 2), {})
    seen = federated.train_locally(model, images[:1], labels[:1], **step)
    return SimpleNamespace(
        file=str(data.bundled_file("lpips_alex.safetensors")),
        photo=str(data.bundled_file("fashion_mnist.png")),
        folder=str(folder),
        images=images,
        labels=labels,
        wide=images.repeat(1, 1, 4, 4),
        model=model,
        seen=seen,
        of_one=federated.train_locally(wide, images[:1], labels[:1], **step),
        of_mlp=federated.train_locally(wide, images, labels, **step),
        of_norm=federated.train_locally(norm, large, classes, **step),
        sent=model.state_dict(),
        update=list(seen.delta),
        noise=noise,
        defended=noise.defend(seen, 0),
        of_adam=federated.train_locally(
            *(model, images[:1], labels[:1]),
            learning_rate=1e-3,
            client_optimizer="adam",
            optimizer_options={"eps": 1e-4},  # at 1e-8 its features show their signs alone
        ),
        clients=[(images[:1], labels[:1]), (images[1:], labels[1:])],
        trial=Trial("grey", dataset="digits"),
        training=options.federation("digits", num_rounds=1),
        frame=pandas.DataFrame({"name": ["a", "b"], "psnr": [10.0, 30.0]}),
        medians=pandas.DataFrame({"n": [5], "psnr_25": [1.0], "psnr_50": [2.0], "psnr_75": [3.0]}),
        judged=pandas.DataFrame({"dataset": "digits", "index": [0, 1], "psnr": [10.0, 30.0]}),
        guessed=thresholds.guesses("digits", [0], reserved=1790, source="bundled"),
        search={"max_evaluations": 2, "num_images": 1, "seed": 0},
        ends=starts.survey(seen, starts=2, max_evaluations=1),
    )


def metric(s):
    return {"estimate": s.images, "truth": s.images}


def search(s, **told):
    return {"seen": s.seen, "labels": "inferred", "restarts": 1, **s.search, **told}


def protocol(s, **more):
    return {"model": s.model, "clients": s.clients, "learning_rate": 0.05, **more}


VALID: dict[str, Callable] = {
    "metrics.psnr": lambda s: {**metric(s), "data_range": 1.0, "per_image": False},
    "metrics.ssim": lambda s: {**metric(s), "data_range": 1.0, "per_image": False},
    "metrics.lpips": lambda s: {
        **{"estimate": s.wide, "truth": s.wide, "data_range": 1.0, "per_image": False}
    },
    "metrics.exact_pixel_rate": metric,
    "metrics.success": lambda s: {"psnr_value": 21.0, "threshold": 20.0},
    "metrics.match": lambda s: {"estimates": s.images, "truths": s.images},
    "metrics.released_psnr": metric,
    "metrics.released_ssim": lambda s: {"estimate": s.wide, "truth": s.wide},
    "federated.train_locally": lambda s: {
        **{"model": s.model, "images": s.images, "labels": s.labels, "learning_rate": 0.05},
        **{"local_steps": 1, "batch_size": 1, "client_optimizer": "sgd", "optimizer_options": {}},
        **{"clear_gradients": True, "transmitted": None},
    },
    "photos.read": lambda s: {"paths": [s.photo], "image_shape": (1, 28, 560)},
    "photos.picture": lambda s: {"path": s.photo, "channels": 1, "size": 8},
    "federated.average": lambda s: {"snapshots": [s.sent, s.sent], "sizes": [1, 2]},
    "federated.rounds": lambda s: protocol(s, num_rounds=1),
    "stopping.StopRule": lambda s: {
        **{"max_evaluations": 2, "tolerance": 0.1, "patience": 5},
        **{"max_iterations": 1, "whole_budget": True},
    },
    "search.Trained": lambda s: {"start": 1.0, "relative": True},
    "search.reconstruct": lambda s: search(
        s,
        **{"distance": dlm_core.objectives.normalised_distance, "scale": 1.0, "keep_every": 1},
        **{"total_variation": 0.0, "dtype": torch.float64, "unknowns": {}, "resume": {}},
        **{"coordinates": dlm_core.coordinates.cosines, "optimizer": dlm_core.optimizers.lbfgs},
    ),
    "attacks.dlg": lambda s: search(s, learning_rate=0.05),
    "attacks.dlg_factor": lambda s: search(s, learning_rate=0.05, k0=1.0),
    "attacks.idlg": lambda s: {"seen": s.seen, "learning_rate": 0.05, **s.search},
    "attacks.inverting_gradients": lambda s: search(s, total_variation=0.0),
    "attacks.dlm": lambda s: search(s, k0=20.0),
    "attacks.dlm_plus": lambda s: search(s, trusted=[torch.ones_like(d) > 0 for d in s.update]),
    "attacks.grey": lambda s: {"seen": s.seen, "num_images": 1},
    "attacks.noise": lambda s: {"seen": s.seen, "num_images": 1, "seed": 0},
    "data.load": lambda s: {"name": "digits", "n": 2, "source": "bundled", "download": False},
    "data.digest": lambda s: {"name": "digits", "source": "bundled"},
    "data.served": lambda s: {"name": "digits", "source": "auto"},
    "data.bundled_file": lambda s: {"name": "digits.png"},
    "label_inference.infer": lambda s: {"seen": s.seen, "num_images": 1, "local_steps": 1},
    "observation.Observation": lambda s: {
        **{"model": s.model, "weights_after": s.seen.weights_after},
        **{"image_shape": (1, 8, 8), "num_classes": 10},
    },
    "observation.observe": lambda s: {
        **{"model": s.model, "before": s.sent, "after": s.seen.weights_after},
        "image_shape": (1, 8, 8),
    },
    "observation.find_head": lambda s: {"model": s.model, "image_shape": (1, 8, 8)},
    "observation.unit_in_last_place": lambda s: {"weights": s.images},
    "weights.load_weights": lambda s: {"path": s.file},
    "weights.rounded": lambda s: {"weights": s.sent, "dtype": torch.bfloat16},
    "models.build": lambda s: {
        **{"name": "lenet", "image_shape": (1, 8, 8), "num_classes": 10, "seed": 0},
        **{"init": "paper", "activation": "sigmoid", "depth": 1},
    },
    "models.lenet": lambda s: {"image_shape": (1, 8, 8), "num_classes": 10, "depth": 1},
    "models.mlp": lambda s: {"image_shape": (1, 8, 8), "num_classes": 10, "hidden": 4, "depth": 1},
    "models.resnet18": lambda s: {
        **{"image_shape": (1, 28, 28), "num_classes": 10, "width": 2, "blocks": 1},
        "activation": "relu",
    },
    "architectures.tutorial": lambda s: {"image_shape": (1, 16, 16), "num_classes": 10},
    "architectures.vgg": lambda s: {"image_shape": (1, 8, 8), "num_classes": 10, "width": 2},
    "architectures.vit": lambda s: {
        **{"image_shape": (1, 8, 8), "num_classes": 10, "patch": 4, "width": 8},
        **{"blocks": 1, "heads": 2},
    },
    "defenses.Setting": lambda s: {
        **{"name": "noise", "options": {"scale": 1e-3}, "observer": "server", "repeats": 1}
    },
    "defenses.noise": lambda s: {
        **{"weights": s.sent, "scale": 0.1, "distribution": "laplace", "seed": 0, "clip": 0.2}
    },
    "defenses.sparsify": lambda s: {
        **{"weights": s.sent, "percent": 10.0, "parameters": list(s.sent)}
    },
    "defenses.clip_and_noise": lambda s: {
        **{"update": s.update, "clip": 1.0, "noise_multiplier": 0.1, "seed": 0}
    },
    "defenses.top_k": lambda s: {"update": s.update, "percent": 10.0},
    "defenses.quantise": lambda s: {"update": s.update, "bits": 8, "seed": 0},
    "defenses.defend": lambda s: {
        **{"seen": s.seen, "defence": "sparsify", "observer": "server", "repeats": 1, "seed": 0},
        "percent": 10.0,
    },
    "defenses.epsilon": lambda s: {
        **{"noise_multiplier": 1.0, "num_rounds": 2, "sample_rate": 1.0, "delta": 1e-5},
        "neighbours": "add or remove",
    },
    "defenses.train_privately": lambda s: {
        **{"model": s.model, "images": s.images, "labels": s.labels, "learning_rate": 0.1},
        **{"clip": 1.0, "noise_multiplier": 1.0, "local_steps": 1, "seed": 0},
    },
    "clients.update": lambda s: {
        **{"model": s.model, "loss": dlm_core.federated.loss, "images": s.images},
        **{"labels": s.labels, "learning_rate": 0.1, "local_steps": 1, "batch_size": 1},
        **{"client_optimizer": dlm_core.clients.sgd, "optimizer_options": {}},
    },
    "clients.step_of": lambda s: {"argument": "client", "key": "sgd"},
    "normalisation.reconstruct": lambda s: {"seen": s.of_norm, "weight": 1.0, **s.search},
    "normalisation.batch_statistics": lambda s: {"seen": s.of_norm},
    "normalisation.local_batches": lambda s: {"seen": s.of_norm},
    "unrolled.unrolled_dlm": lambda s: search(
        s, client_optimizer="sgd", optimizer_options={}, local_steps=1, batch_size=1
    ),
    "unrolled.next_steps": lambda s: {"losses": {1: 0.1}, "max_local_steps": 4, "finest": 1.0},
    "ablation.ablated": lambda s: {
        **{"seen": s.seen, "objective": "told rate", "learning_rate": 0.05, "start": "grey"},
        **{"box": True, "smooth": True, **s.search},
    },
    "exact.recover": lambda s: {
        **{"seen": s.seen, "weight_decay": False, "transmitted": None, "max_steps": 0},
        "trusted": [torch.ones_like(d) > 0 for d in s.update],
        "extra_variance": [0.0 for d in s.update],
    },
    "information.of_update": lambda s: {
        **{"model": s.model, "images": s.images[:1], "labels": s.labels[:1]},
        **{"learning_rate": 0.05, "local_steps": 1, "batch_size": 1, "client_optimizer": "sgd"},
        **{"optimizer_options": {}, "transmitted": None, "defence": s.noise, "prior": "white"},
        "seed": 0,
    },
    "information.noise_for": lambda s: {
        **{"model": s.model, "images": s.images[:1], "labels": s.labels[:1], "psnr": 20.0},
        **{"learning_rate": 0.05, "local_steps": 1, "batch_size": 1, "client_optimizer": "sgd"},
        **{"optimizer_options": {}, "prior": "smooth", "clip": 1.0},
    },
    "exact.bound": lambda s: {
        **{"seen": s.seen, "images": s.images[:1], "labels": s.labels[:1], "learning_rate": 0.05}
    },
    "adaptive.recover": lambda s: {"seen": s.defended, "defence": s.noise, "max_steps": 0},
    "adaptive.dlm_plus": lambda s: {
        **{"seen": s.defended, "defence": s.noise, "total_variation": 0.0, **s.search}
    },
    "adaptive.unrolled_dlm": lambda s: {
        **{"seen": s.defended, "defence": s.noise, "learning_rate": 0.1, "local_steps": 1},
        **s.search,
    },
    "adaptive.combined": lambda s: {
        **{"rounds": [s.defended, s.defended], "defence": s.noise, **s.search}
    },
    "starts.survey": lambda s: {
        **{"seen": s.seen, "starts": 2, "seed": 0, "alike": 25.0, "max_evaluations": 1}
    },
    "signlike.interval_dlm": lambda s: {"seen": s.of_adam, **s.search},
    "signlike.read": lambda s: {"seen": s.of_adam},
    "signlike.sign_dlm": lambda s: {"seen": s.of_adam, "total_variation": 0.0, **s.search},
    "recognise.recognise": lambda s: {"seen": s.seen},
    "recognise.linear_step": lambda s: {"seen": s.seen},
    "learned.plug_and_play": lambda s: {
        **{"seen": s.defended, "defence": s.noise, "learning_rate": 0.05, "local_steps": 1},
        **{"num_images": 1, "labels": "inferred", "seed": 0, "max_evaluations": 2},
        **{"last_noise": 0.1, "training_steps": 2},
    },
    "batches.recover_batch": lambda s: {
        **{"seen": s.of_mlp, "num_images": 2, "seed": 0, "max_rounds": 1}
    },
    "protocols.fedsgd": lambda s: protocol(s, num_rounds=1),
    "protocols.aggregate": lambda s: protocol(s, curious=False, defend=None),
    "protocols.rounds": lambda s: protocol(s, num_rounds=1, defend=None),
    "protocols.gossip": lambda s: protocol(s, turn=0, accomplice=False, private=False),
    "protocols.two_hops": lambda s: protocol(s, clients=2 * s.clients, attack="exact"),
    "protocols.others": lambda s: {"mean": s.update, "own": s.update, "number": 2.0},
    "protocols.exchange": lambda s: {
        **{"starts": [s.model, s.model], "clients": s.clients, "learning_rate": 0.05},
        "num_rounds": 1,
    },
    "protocols.ring": lambda s: {"peer": 0, "size": 3},
    "protocols.shuffled": lambda s: {"model": s.model, "seed": 0},
    "epochs.orders": lambda s: {"num_images": 4, "num_epochs": 2, "seed": 0},
    "epochs.shuffled": lambda s: protocol(s, batch_size=1, num_epochs=1, order=0),
    "surrogate.sme": lambda s: search(s, curved=False, total_variation=0.0),
    "surrogate.surrogate_dlm": lambda s: search(s, curved=False),
    "invariant.order_invariant": lambda s: search(
        s, learning_rate=0.05, num_epochs=1, batch_size=1, over="max", weight=1.0
    ),
    "spread.shuffled_dlm": lambda s: {
        **{"seen": s.seen, "labels": "inferred", "local_steps": 1, "momentum": 0.0, **s.search}
    },
    "utility.Training": lambda s: {
        **{"learning_rate": 0.1, "local_steps": 1, "batch_size": None, "clip": 1.0},
        "noise_multiplier": 1.0,
    },
    "utility.Federation": lambda s: {
        **{"defence": s.noise, "dataset": "digits", "model": "lenet", "model_options": {}},
        **{"num_clients": 2, "num_rounds": 1, "client": {"learning_rate": 0.1}, "seed": 0},
    },
    "options.federation": lambda s: {"dataset": "digits", "num_rounds": 1},
    "options.in_colour": lambda s: {"num_rounds": 1, "dataset": "digits"},
    "options.undefended": lambda s: {"training": s.training},
    "options.menu": lambda s: {
        **{"training": s.training, "scales": [0.1], "percents": [10], "multipliers": [0.1]},
        **{"dp_sgd": [1.0], "kept_out": [90], "bits": [8]},
    },
    "options.price": lambda s: {"before": [0.9, 0.8], "after": [0.8, 0.8]},
    "thresholds.shown": lambda s: {"dataset": "digits"},
    "thresholds.guesses": lambda s: {
        **{"dataset": "digits", "attacked": [0], "reserved": 1790, "source": "bundled"}
    },
    "all_rounds.Watched": lambda s: {
        **{"training": s.training, "shown": s.noise, "attack": "aware_exact"},
        **{"attack_options": {"max_steps": 0}, "averaged": True, "index": 0, "num_images": 1},
        **{"local_steps": 1, "every": 1},
    },
    "thresholds.baselines": lambda s: {"guessed": s.guessed},
    "all_rounds.averaged": lambda s: {"rounds": [s.seen, s.seen]},
    "tables.where": lambda s: {"frame": s.frame, "name": "a"},
    "tables.only": lambda s: {"frame": s.frame, "name": "a"},
    "tables.psnrs": lambda s: {"frame": s.frame},
    "tables.interval": lambda s: {"values": [1.0, 2.0, 3.0]},
    "report.knowledge": lambda s: {"seen": s.seen, "attacks": ["dlm_plus"]},
    "figures.name": lambda s: {"key": "dlm_plus", "kind": "attack"},
    "figures.look": lambda s: {"key": "dlm_plus", "kind": "attack"},
    "figures.shade": lambda s: {"learning_rate": 0.01},
    "figures.weights": lambda s: {"init": "paper"},
    "figures.counted": lambda s: {"rows": s.medians},
    "figures.thresholds": lambda s: {"axis": Figure().subplots(), "grey": 13.0, "along": "x"},
    "figures.heading": lambda s: {"axis": Figure().subplots(), "letter": "a", "text": "title"},
    "figures.medians": lambda s: {"axis": Figure().subplots(), "x": [1.0], "rows": s.medians},
    "figures.strip": lambda s: {"axis": Figure().subplots(), "place": 0.0, "values": [1.0]},
    "figures.legend": lambda s: {"figure": Figure(), "ncols": 2},
    "clusters.sentence": lambda s: {"ends": s.ends},
    "clusters.show": lambda s: {"ends": s.ends, "most": 2},
    "figures.show_images": lambda s: {"rows": [[s.images[0]]], "row_names": ["digit"]},
    "audit.audit": lambda s: {
        **{"before": s.sent, "after": s.seen.weights_after, "model": s.model, "attack": "exact"},
        **{"image_shape": (1, 8, 8), "num_images": 1, "num_classes": 10, "client": None},
        **{"normalise": "half"},
        "out": f"{tempfile.gettempdir()}/reconstruction.png",
    },
    "exposure.bound": lambda s: {
        **{"weights": s.sent, "images": s.images[:1], "labels": s.labels[:1], "model": s.model},
        **{"learning_rate": 0.05, "local_steps": 1, "batch_size": 1, "client_optimizer": "sgd"},
        **{"optimizer_options": {}, "transmitted": None, "defence": s.noise, "num_classes": None},
        **{"normalise": "half", "out": f"{tempfile.gettempdir()}/exposure.png"},
    },
    "account.account": lambda s: {"found": Audit(results={}, beliefs={}, look=Look(), notes=[])},
    "page.page": lambda s: {"found": Audit(results={}, beliefs={}, look=Look(), notes=[])},
    "kept.read": lambda s: {"folder": s.folder},
    "files.snapshots": lambda s: {
        **{"before": s.sent, "after": s.seen.weights_after, "expected": s.sent}
    },
    "tables.success": lambda s: {"frame": s.frame, "threshold": 20.0},
    "tables.said": lambda s: {"frame": s.frame, "threshold": 20.0},
    "tables.rms": lambda s: {"tensors": s.update},
    "tables.brief": lambda s: {"values": [1.0, 2.0], "digits": 6},
    "tables.listed": lambda s: {"texts": ["a", "b"], "separator": ", "},
    "sweeps.summarise": lambda s: {"frame": s.frame, "by": ["name"]},
    "evidence.share": lambda s: {"frame": s.judged, "label": "x", "at": 20.0},
    "evidence.median": lambda s: {"frame": s.judged, "label": "x", "column": "psnr"},
    "evidence.difference": lambda s: {
        **{"first": s.judged, "second": s.judged, "label": "x", "column": "psnr"}
    },
    "evidence.share_difference": lambda s: {
        **{"first": s.judged, "second": s.judged, "label": "x", "at": 20.0}
    },
    "evidence.middle": lambda s: {"values": [1.0, 2.0], "label": "x", "quantity": "q"},
    "evidence.mean": lambda s: {"values": [1.0, 2.0], "label": "x", "quantity": "q"},
    "evidence.computed": lambda s: {"value": 1.0, "label": "x", "quantity": "q"},
    "preprocessing.normalised": lambda s: {"model": s.model, "normalise": "half"},
    "kinds.make": lambda s: {"kind": "MLP", "index": 0},
    "calibration.Case": lambda s: {"kind": "MLP", "index": 0, "compared": False},
    "bounds.Bound": lambda s: {"trial": s.trial},
    "bounds.Noise": lambda s: {"trial": s.trial, "psnr": 20.0, "prior": "smooth"},
    "timed.Timed": lambda s: {"trial": s.trial},
    "calibration.cases": lambda s: {"n": 1, "of": ["MLP"], "compared": False},
    "inputs.division": lambda s: {"seen": s.of_one, "transmitted": None},
    "inputs.layer_inputs": lambda s: {"seen": s.of_one, "transmitted": None},
    "weighted.weighted": lambda s: {
        **{"seen": s.seen, "seed": 0, "max_steps": 1, "num_coordinates": 8, "far": True}
    },
    "leading.features": lambda s: {"seen": s.seen},
    "leading.leading": lambda s: {"seen": s.seen},
    "noisy.noisy_inputs": lambda s: {"seen": s.seen, "layers": []},
    "tutorials.coloured": lambda s: {"images": s.images},
    "tutorials.nearest": lambda s: {"images": s.images, "found": s.images[:1]},
    "released.trials": lambda s: {
        **{"script": "DLM_plus", "network": "lenet", "n": 1, "source": "bundled"},
        **{"iterations": 1, "keep_every": 1},
    },
    "released.script_of": lambda s: {"trial": s.trial},
    "released.search": lambda s: {"trial": s.trial},
    "settings.sentence": lambda s: {"trials": [s.trial], "n": "3 images"},
    "sweeps.sweep": lambda s: {"trials": [s.trial], "jobs": 1, "store": None},
    "trials.Client": lambda s: {
        **{"learning_rate": 0.1, "local_steps": 1, "batch_size": 1, "client_optimizer": "sgd"},
        **{"optimizer_options": {}, "clear_gradients": True, "transmitted": "bfloat16"},
        **{"dtype": "float32", "mode": "train"},
    },
    "trials.Protocol": lambda s: {"name": "fedsgd", "others": 1, "options": {}},
    "trials.Trial": lambda s: {
        **{"attack": "dlm_plus", "attack_options": {}, "dataset": "digits", "source": "bundled"},
        **{"index": 0, "num_images": 1, "model": "lenet", "model_options": {}, "trained": 0},
        **{"defence": s.noise, "protocol": None, "seed": 0},
    },
    "trials.repeated": lambda s: {"trial": s.trial, "n": 1, "start": 0},
}

# Arguments whose values may all be right: words to print, values to look for, gaps that are told as
# such, and trials among others.
OF_ANY_VALUE = {
    *(("tables.where", "name"), ("tables.listed", "separator"), ("sweeps.sweep", "store")),
    *(("figures.heading", "letter"), ("figures.heading", "text"), ("figures.counted", "of")),
    *(("tables.brief", "values"), ("settings.sentence", "n"), ("settings.sentence", "trials")),
    *((f"evidence.{each}", "label") for each in ("share", "median", "difference", "computed")),
    *((f"evidence.{each}", "label") for each in ("share_difference", "middle", "mean")),
    *((f"evidence.{each}", "quantity") for each in ("middle", "mean", "computed")),
    *((f"evidence.{each}", "units") for each in ("share", "difference")),
}


# --- what is wrong

NAN, INF = math.nan, math.inf
BY_NAME: dict[str, list] = {
    "num_images": [0, -1, 1.5, NAN],
    "seed": [-1, 0.5, NAN],
    "restarts": [0, -1, 1.5],
    "max_evaluations": [0, -5, 1.5, NAN],
    "tolerance": [-1.0, NAN, INF],
    "patience": [0, 1.5],
    "keep_every": [0, -1, 1.5],
    "learning_rate": [0, -1.0, NAN, INF],
    "k0": [0, -1.0, NAN, INF],
    "start": [-1, NAN, INF],
    "scale": [-1.0, NAN, INF],
    "total_variation": [-1.0, NAN, INF],
    "weight": [-1.0, NAN, INF],
    "local_steps": [0, -1, 1.5, NAN],
    "max_steps": [-1, 1.5, NAN],
    "max_local_steps": [0, -1, 1.5, NAN],
    "max_rounds": [-1, 1.5],
    "batch_size": [0, -1, 1.5],
    "num_rounds": [0, -1, 1.5],
    "num_clients": [0, -1, 1.5, 100_000],
    "others": [-1, 0.5],
    "turn": [-1, 0.5],
    "peer": [-1, 7, 0.5],
    "size": [1, 0.5],
    "number": [1, 0.5, NAN, INF],
    "starts": [[], ["a", "b"]],
    "trained": [-1, 0.5],
    "index": [-1, 0.5],
    "n": [0, -1, 1.5],
    "jobs": [0, -2, 1.5],
    "repeats": [0, -1, 1.5],
    "parameters": [["no_such"]],
    "percent": [-1, 101, NAN],
    "bits": [1, -3, 2.5, 1000],
    "psnr": [12.0, NAN, INF],
    "clip": [0, -1.0, NAN, INF],
    "noise_multiplier": [-1.0, NAN, INF],
    "sample_rate": [-0.1, 1.5, NAN],
    "delta": [-0.1, 0, 1.0, NAN],
    "data_range": [0, -1.0, NAN, 255.0],
    "threshold": [NAN],
    "num_classes": [1, 0, 2.5, 7],
    "image_shape": [(), (8, 8), (1, 8, 0), (3, 8, 8), (1, 8, 8.5), "1,8,8"],
    "depth": [0, 1.5],
    "hidden": [0, 1.5],
    "width": [0, 1.5],
    "blocks": [0, 1.5],
    "sizes": [[], [1], [0, 0], [-1, 2], [NAN, 1], ["a", 1]],
    "snapshots": [[], [{}], ["a", "b"]],
    "clients": [[], [1, 2]],
    "dtype": [torch.int64, torch.bool],
    "attacks": ["dlm_plus", ["dlmm"]],
    "losses": [{}, {0: 1.0}],
    "finest": [NAN],
    "defence": ["sparsity", {}, {"name": "sparsity"}, {"name": "noise", "scal": 1}],
    "options": [{"no_such": 1}],
    "optimizer_options": [{"no_such": 1}, {"momentum": "a"}, {"momentum": -1.0}],
    "model_options": [{"no_such": 1}],
    "attack_options": [{"no_such": 1}],
    "trusted": [[], [torch.ones(2) > 0]],
    "extra_variance": [[], [1.0], [-1.0] * 8, [NAN] * 8, ["a"] * 8],
    "values": [[], [NAN, 1.0], "ab"],
    "rows": [[], [["a"]]],
    "unknowns": [{"momentum": "a"}],
    "trials": [["a"]],
}  # fmt: skip


def wrong_images(images):
    """No images of [0, 1], in what they hold or in shape."""
    yield from (images * 255, images - 1, images.clone().fill_(NAN))
    yield from wrong_shapes(images)


def wrong_shapes(images):
    """Not as many images of that shape. An estimate may hold anything: a search can diverge."""
    yield from (images[0], images[:0], images.flatten(), images.new_zeros(2, 3, 8, 8))


def wrong_labels(labels):
    yield from (labels + 10, labels - 20, labels[:0], labels.float() + 0.5, labels.repeat(3))


TENSORS = {
    "images": wrong_images,
    "estimate": wrong_shapes,
    "truth": wrong_images,
    "estimates": wrong_shapes,
    "truths": wrong_images,
    "labels": wrong_labels,
}
WEIGHTS = {"weights", "weights_after", "before", "after"}
# Other words for an argument, where a sentence that has them is as clear.
WORDS = {
    "defenses.Setting": {"name": "defence", "options": "told scale"},
    "clients.step_of": {"key": "client "},
    "models.build": {"name": "model"},
    "photos.read": {"image_shape": "(C, H, W)"},
    "weights.load_weights": {"path": "snapshot"},
}
# Of these lists, what a function rightly takes: (start of its key, argument, repr of the value).
FINE = {
    # a network of any such shape can be built
    ("models.", "image_shape", "(3, 8, 8)"),
    ("models.", "num_classes", "7"),
    ("architectures.", "image_shape", "(3, 8, 8)"),
    ("architectures.", "num_classes", "7"),
    # what is no number is no success
    ("metrics.success", "psnr_value", "nan"),
    # any weights can be rounded and defended, those of no network as well
    *(("weights.rounded", "weights", each) for each in ("{}", "{'0.weight': tensor([0., 0.])}")),
    *(("defenses.", "weights", each) for each in ("{}", "{'0.weight': tensor([0., 0.])}")),
    # a notebook may ask for none
    ("trials.repeated", "n", "0"),
    # a row of a figure may have no trial
    ("figures.strip", "values", "[]"),
    # no defence is told as None or as nothing
    ("adaptive.combined", "defence", "{}"),
    # many starts at once
    *((key, "seed", "[1]") for key in ("attacks.d", "attacks.i", "search.", "signlike.")),
    *((key, "seed", "[1]") for key in ("adaptive.dlm", "adaptive.unr", "adaptive.comb")),
    *((key, "seed", "[1]") for key in ("ablation.", "normalisation.", "surrogate.s")),
    # a picture of one pixel
    ("photos.picture", "size", "1"),
    # a folder that is made
    ("sweeps.sweep", "store", "'x'"),
    # the name that an argument goes by
    *(("clients.step_of", "argument", each) for each in ("'clients'", "''")),
}
ANYTHING = object()  # of no type that anything takes


def wrong_values(name, value, hint):
    """Values that an argument of this name, with this valid value and annotation, does not take."""
    optional = type(None) in typing.get_args(hint) or hint is type(None) or hint is typing.Any
    yield ANYTHING
    if value is not None and not optional:
        yield None
    if isinstance(value, bool):
        yield from ("yes", 2)
    elif isinstance(value, (int, float)):
        yield from ("x", [1], *BY_NAME.get(name, [NAN]))
    elif isinstance(value, str):
        yield from (f"{value}s", 3, "")
    elif isinstance(value, torch.Tensor):
        yield from ("x", *TENSORS.get(name, lambda _: [])(value))
    elif name in WEIGHTS:
        yield from ({}, {"0.weight": 3}, {"0.weight": torch.zeros(2)}, [1])
    elif isinstance(value, (Mapping, Sequence)):
        yield from (3, "x", *BY_NAME.get(name, []))
    else:
        yield from (3, "x", *BY_NAME.get(name, []))


def function_of(key):
    module, name = key.split(".")
    return getattr(getattr(dlm_core, module), name)


def hints_of(function):
    try:
        return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except TypeError:
        return {}


def wrong_calls(key):
    """(name of the argument, its wrong value, all arguments of the call) for each wrong call."""
    valid = VALID[key](scene())
    hints = hints_of(function_of(key))
    for name, value in valid.items():
        for wrong in wrong_values(name, value, hints.get(name, typing.Any)):
            if any(key.startswith(k) and (name, repr(wrong)) == (n, w) for k, n, w in FINE):
                continue
            yield name, wrong, {**valid, name: wrong}
    yield "no_such_argument", 1, {**valid, "no_such_argument": 1}


def outcome(key, name, arguments):
    """None where the call ended in one clear sentence; otherwise what happened instead."""
    try:
        made = function_of(key)(**arguments)
        if inspect.isgenerator(made):
            list(made)
    except Exception as error:
        said = str(error)
        clear = isinstance(error, (ValueError, TypeError, OSError)) and "\n" not in said
        words = [name, name.replace("_", " "), name.removesuffix("s")]
        words += [WORDS[key][name]] if name in WORDS.get(key, ()) else []
        if isinstance(arguments[name], Mapping):  # or what is wrong in it
            words += [str(inner) for inner in arguments[name]]
        if clear and any(word in said for word in words):
            return None
        return f"raw {type(error).__name__}: {said[:150]!r}"
    return None if (key, name) in OF_ANY_VALUE else "silent"


@pytest.mark.parametrize("key", sorted(VALID))
def test_every_wrong_call_ends_in_one_clear_sentence(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where what goes through by mistake would write
    function_of(key)(**VALID[key](scene()))
    said = []
    for name, wrong, arguments in wrong_calls(key):
        if problem := outcome(key, name, arguments):
            said.append(f"{key}({name}={check.shown(wrong)}): {problem}")
    assert not said, "\n".join(said)


def test_wrong_calls_are_many():
    assert sum(1 for key in VALID for _ in wrong_calls(key)) >= 2000


# They start processes, train, write, or are called by a function that is tried, on its arguments.
UNTRIED = {
    *("data.read_once", "federated.descend", "memory.cost", "models.resnet18_bn"),
    *("normalisation.gradient_and_statistics", "normalisation.matched", "options.accuracies"),
    "options.over_rounds",  # tests/harness/test_options.py
    *("protocols.data_parallel", "report.locked", "report.shared", "sweeps.engine"),
    *("tables.per_image", "tables.over_networks"),  # tests/harness/test_tables.py
    *("unrolled.find_steps", "kept.audits", "federation.run"),
    "flower.keeping",  # tests/harness/with_flower.py
    "search.preparing",
}


def test_every_function_that_checks_its_arguments_is_tried():
    checked = {
        f"{module}.{name}"
        for module, path in dlm_core.MODULES.items()
        if module not in INNER - {"memory"} and ".project." not in path
        for name, each in vars(getattr(dlm_core, module)).items()
        if inspect.isfunction(each) and each.__module__ == path and hasattr(each, "__wrapped__")
        if not name.startswith("_")
    }
    assert checked - set(VALID) == UNTRIED
