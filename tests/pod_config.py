"""Stages of the digits job at tiny sizes, in one or several processes: what they read is noted."""

import dataclasses
import hashlib
import json
import pathlib

import jax
import ml_collections
import resume_config

from starflow2_jax.training.pretzel import PretzelTask


def get_config():
    config = resume_config.get_config()
    config.mesh.update(data=1, fsdp=4, tensor=2)
    first, last = config.stages.text_to_image, config.stages.joint
    last.batch = ml_collections.ConfigDict(dict(rows=8, lanes=4, length=64, images=3, targets=48))
    first.batch = last.batch.copy_and_resolve_references()
    first.batch.update(targets=64, prefix=48)
    first.mixture = dict(draw=1.0)
    for stage in config.stages.values():
        stage.optimizer.update(steps=4, accumulate=2)
    config.checkpoint.every = 3
    config.evaluation.every = 2
    config.log_seconds = 0.0
    return config


@dataclasses.dataclass(frozen=True)
class NotingTask(PretzelTask):
    """Writes a line for each batch that is read: a digest of each of its rows."""

    workdir: pathlib.Path = pathlib.Path()

    def batches(self, stage, held_out, seed, rows=None, place=None):
        if held_out or place is None:
            return super().batches(stage, held_out, seed, rows, place)
        path = self.workdir / f"rows_{stage}_{jax.process_index()}.jsonl"

        def noting(batch):
            first = 0 if rows is None else rows.start
            digests = {}
            for row in range(len(batch["tokens"])):
                digest = hashlib.sha256()
                for name in sorted(batch):
                    digest.update(batch[name][row].tobytes())
                digests[first + row] = digest.hexdigest()
            with path.open("a") as file:
                file.write(json.dumps(digests) + "\n")
            return place(batch)

        return super().batches(stage, held_out, seed, rows, noting)


def make_task(config, workdir):
    data = resume_config.make_data(config)
    model = resume_config.make_model_config(config, data)
    return NotingTask(config, data, model, draw_samples=None, workdir=workdir)
