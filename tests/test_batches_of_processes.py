"""Two processes read their own rows, save, and one continues; as one process does it all along."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from source_files import make_webdataset

PROGRAM = """
    import os
    import signal
    import sys
    import time
    from pathlib import Path

    import jax

    index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    if port != "0":
        os.environ["STARFLOW2_DISTRIBUTED"] = "1"
        os.environ["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
        os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_PROCESS_ID"] = "2", str(index)

    from starflow2_jax.parallel.distributed import fetch, join_job, preempted

    join_job()
    assert jax.process_count() == (1 if port == "0" else 2)

    import numpy as np

    from starflow2_jax.data.mixture import Entry, MixtureData
    from starflow2_jax.data.pipeline import BatchShape, packed_batches
    from starflow2_jax.data.sequences import ImageShape
    from starflow2_jax.data.sources import WebDatasetSource
    from starflow2_jax.data.tasks import Draw, Read
    from starflow2_jax.data.tokenizer import train_tokenizer
    from starflow2_jax.parallel import rules
    from starflow2_jax.parallel.mesh import MeshConfig, make_mesh
    from starflow2_jax.training.checkpoint import Checkpoints

    source = WebDatasetSource(folder / "*.tar")
    data = MixtureData(
        tokenizer=train_tokenizer(["a picture of number"] * 10, 300),
        image=ImageShape(16, 16, 3, 2),
        codec=None,
        entries={"draw": Entry(source, Draw("png")), "read": Entry(source, Read("png"))},
        mixtures={"joint": {"draw": 2.0, "read": 1.0}},
    )
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    shape = BatchShape(rows=8, length=96, images=4, lanes=2)
    rows = rules.local_rows(8, mesh)
    assert (rows.stop - rows.start) * jax.process_count() == 8
    iterator = iter(
        packed_batches(
            data.documents("joint", False, 0),
            shape,
            rows,
            lambda batch: rules.place_batch(batch, 8, mesh),
        )
    )
    state = {"x": np.zeros(1)}
    seen = []
    with Checkpoints(folder / "run") as checkpoints:
        latest = checkpoints.latest()
        if latest is not None:
            checkpoints.restore(latest, state, iterator)
        for _ in range(int(sys.argv[5])):
            batch = next(iterator)
            assert batch["tokens"].shape == (8, 96)
            seen.append(fetch(batch))
        if port != "0" and latest is None:
            checkpoints.save(3, state, iterator)
    iterator.close()

    # SIGTERM to one process: all of them end behind the same step.
    for step in range(200):
        if step == 5 and index == 0 and port != "0":
            os.kill(os.getpid(), signal.SIGTERM)
        if preempted(step):
            print("asked to end at", step)
            break
        time.sleep(0.05)
    else:
        print("never asked")

    if index == 0:
        flat = {f"{i}.{name}": value for i, one in enumerate(seen) for name, value in one.items()}
        np.savez(folder / f"{sys.argv[4]}.npz", **flat)
"""


def run(folder, name, count, batches=3):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1] if count > 1 else 0
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(port), str(folder), name, str(batches)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=pathlib.Path(__file__).parent.parent,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    ends = {line for out in outputs for line in out.splitlines() if "asked" in line}
    assert len(ends) == 1 and ("never asked" in ends) == (count == 1)
    return np.load(folder / f"{name}.npz")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_read_what_one_reads_and_one_goes_on(tmp_path):
    make_webdataset(tmp_path, 24)
    alone = run(tmp_path, "alone", 1, batches=6)
    together = run(tmp_path, "together", 2)
    # They have saved; one process goes on from there, and two do.
    resumed, both = run(tmp_path, "resumed", 1), run(tmp_path, "both", 2)
    for first, found in ((0, together), (3, resumed), (3, both)):
        for name in found.files:
            number, _, field = name.partition(".")
            np.testing.assert_array_equal(found[name], alone[f"{int(number) + first}.{field}"])
