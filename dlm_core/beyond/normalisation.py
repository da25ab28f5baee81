"""What batch normalisation sends besides its weights: running statistics, in which the client's batch can be read.

In train mode each of a client's E batches moves a layer's running mean and variance r by its own statistics s,

    r <- (1 - m) r + m s,      so that      (r_after - (1 - m)^E r_before) / (1 - (1 - m)^E)

is a weighted mean of the s of the E batches, and for E = 1 that batch's mean and variance, channel by channel. FedAvg sends the
whole state dict, so r is in both snapshots, and E beside it (``num_batches_tracked``). In eval mode r stays and says nothing.
"""

from torch.nn.modules.batchnorm import _BatchNorm

from dlm_core import attacks, check, objectives, records


def local_batches(seen):
    """E, the number of batches that the client took, as each batch-norm layer counted them: {layer's name: E > 0}.

    Layers that counted nothing (eval mode, or no running statistics) are left out; {} where no layer counted.
    """
    layers = {name: layer for name, layer in seen.model.named_modules() if isinstance(layer, _BatchNorm)}
    counted = {name: layer.num_batches_tracked for name, layer in layers.items() if layer.track_running_stats}
    steps = {name: int(seen.weights_after[_key(name, "num_batches_tracked")]) - int(n) for name, n in counted.items()}
    return {name: number for name, number in steps.items() if number > 0}


def batch_statistics(seen):
    """{layer's name: [mean [C], variance [C]]} of what entered each batch-norm layer, in float64, on the model's device.

    The variance is the unbiased one, as PyTorch keeps it. Over several batches both are weighted means, see above.
    """
    found = {}
    for name, steps in local_batches(seen).items():
        layer, found[name] = seen.model.get_submodule(name), []
        before = int(layer.num_batches_tracked)
        left = before / (before + steps) if layer.momentum is None else (1 - layer.momentum) ** steps
        for part in ("running_mean", "running_var"):
            r = getattr(layer, part).double()
            after = seen.weights_after[_key(name, part)].to(r)
            found[name].append((after - left * r) / (1 - left))
    return found


def moments(x):
    """[mean [C], unbiased variance [C]] of a layer's input x [B, C, ...], as batch normalisation takes them."""
    rest = [axis for axis in range(x.ndim) if axis != 1]
    return [x.mean(rest), x.var(rest)]


def gradient_and_statistics(names):
    """``objectives.gradient``, followed by the moments of what enters the layers called ``names``, from the same pass."""

    def update_of(model, loss, images, labels):
        inputs = {}
        layers = [model.get_submodule(name) for name in names]
        hooks = [layer.register_forward_pre_hook(lambda layer, given: inputs.update({layer: given[0]})) for layer in layers]
        try:
            g = objectives.gradient(model, loss, images, labels)
        finally:
            for hook in hooks:
                hook.remove()
        return [*g, *(moment for layer in layers for moment in moments(inputs[layer]))]

    return update_of


def matched(distance, targets, weight):
    """``distance`` between gradient and Δ, plus ``weight`` times the mean relative squared error of the statistics.

    It takes [*g, *statistics] for g. Each layer's means are measured against its standard deviations, its variances against
    themselves, so that no layer's scale counts.
    """
    units = [unit for _, variance in targets.values() for unit in (variance.sum(), variance.square().sum())]
    flat = [moment for both in targets.values() for moment in both]

    def between(g, d, *k):
        errors = [(s - t.to(s)).square().sum() / unit.to(s) for s, t, unit in zip(g[len(d) :], flat, units)]
        return distance(g[: len(d)], d, *k) + weight * (sum(errors) / len(flat))

    return between


@records.attack("statistics", title="DLM+ with statistics", colour=3, marker="^")
def reconstruct(seen, distance=objectives.normalised_distance, *, weight=1e3, **options):
    """``search.reconstruct`` that matches the client's batch statistics too: DLM+ unless ``distance`` differs.

    Told: nothing but the two snapshots, running statistics included; it assumes one batch.
    weight  of the statistics beside the distance; 1e3 served best of 0.1 to 1e7 on one image and a ResNet of width 16.

    Other options as there. Raises ValueError where the client sent no statistics of a batch.
    """
    check.in_range("weight", weight, 0, float("inf"))
    targets = batch_statistics(seen)
    if not targets:
        raise ValueError("seen holds no batch statistics: no batch-norm layer of the model moved its running mean")
    joint = matched(distance, targets, weight)
    return attacks.reconstruct(seen, joint, update_of=gradient_and_statistics(list(targets)), **options)


def _key(name, part):
    return f"{name}.{part}".lstrip(".")
