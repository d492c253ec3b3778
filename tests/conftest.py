import gc
import importlib.metadata
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are tiny: they take far longer to compile than to run. The code that fusions get on
# CPU is the slowest part of it; newer compilers have no other, and refuse the flag. Of the pass
# that is left out, see `parallel/cpu.py`.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_disable_hlo_passes=all-reduce-promotion"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Each compiled program holds memory maps, of which a process may have only so many."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
