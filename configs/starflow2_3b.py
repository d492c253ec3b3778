"""About 1 B trainable parameters on a frozen Qwen2.5-VL-3B, at 256 x 256; else as starflow2_7b.py.

starflow2 plan --config configs/starflow2_3b.py --topology v5e:8x8
"""

import importlib.util
import pathlib

import ml_collections

from starflow2_jax.models.qwen2_5_vl import qwen2_5_vl_3b
from starflow2_jax.training.pretzel import PretzelTask

_spec = importlib.util.spec_from_file_location(
    "starflow2_7b", pathlib.Path(__file__).with_name("starflow2_7b.py")
)
larger = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(larger)

smoke = larger.smoke

# See starflow2_7b.py.
TOPOLOGIES = {
    "v5e:8x8": (dict(fsdp=8, columns=8), dict(image_to_text=4, joint=4)),
    "v6e:8x8": (dict(fsdp=8, columns=8), dict(image_to_text=2, joint=2)),
    "v6e:2x2": (dict(fsdp=4), {}),
    "h100:2x8": (dict(fsdp=16), dict(text_to_image=2, image_to_text=4, joint=4)),
}


def get_config() -> ml_collections.ConfigDict:
    config = larger.get_config()
    # 20 layers of width 2048.
    config.flow.update(width=2048, deep_layers=14, shallow_layers=(3, 3))
    return config


def for_topology(config: ml_collections.ConfigDict) -> None:
    larger.apply(config, TOPOLOGIES)


def make_task(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> PretzelTask:
    del workdir
    return larger.task_of(config, qwen2_5_vl_3b())
