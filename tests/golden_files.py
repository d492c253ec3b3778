"""The golden files of the folder that STARFLOW_GOLDEN names, recognised by what they hold."""

import json
import os
import pathlib

import numpy as np

FOLDER = pathlib.Path(os.environ.get("STARFLOW_GOLDEN", pathlib.Path(__file__).parent / "golden"))


def recognise(path):
    """Which computation a file holds, by its config's keys (pieces have no config)."""
    with np.load(path) as data:
        if "config_json" not in data:
            if "rope/spec_json" in data:
                return "pieces"
        else:
            config = json.loads(str(data["config_json"]))
            if {"vlm", "flow"} <= set(config):
                return "joint" if "in/kinds" in data else "sample"
            if {"sos", "txt_size", "seq_order"} <= set(config):
                return "starflow"
            if {"nvp", "num_classes", "patch_size"} <= set(config):
                return "tarflow"
    raise ValueError(f"{path}: not a golden file that these tests know")


def files(kind):
    return sorted(p for p in FOLDER.glob("*.npz") if recognise(p) == kind)
