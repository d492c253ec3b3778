"""Random weights and pictures from which `inception_features.json` was made.

By torch-fidelity's FeatureExtractorInceptionV3 in float64: it needs torchvision, whose wheel on
PyPI does not go with a torch that has no CUDA, so its numbers are kept and it is not run here.
"""

import numpy as np

from starflow2_jax.models.inception import shapes

EVERY = 16


def state():
    """Tensors under the public names, float32."""
    wanted = {**shapes(), "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    rng = np.random.default_rng(0)
    made = {}
    for name in sorted(wanted):
        shape, kind = wanted[name], name.rpartition(".")[2]
        if kind == "running_var":
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("bn.weight"):
            value = rng.uniform(0.8, 1.2, shape)
        elif kind == "weight":  # keeps the size of what it is given
            value = rng.normal(size=shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        else:
            value = 0.1 * rng.normal(size=shape)
        made[name] = value.astype(np.float32)
    return made


def images():
    """Of several sizes: smaller, larger, as the network takes them."""
    rng = np.random.default_rng(1)
    sizes = ((28, 28), (320, 411), (299, 299))
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
