"""Copies in another order of memory; and which parts of the package import which."""

import ast
import pathlib

import ml_dtypes
import numpy as np
import pytest

import starflow2_jax
from starflow2_jax.convert.layout import contiguous

# From the top: a part imports parts of its own line and of those below.
LINES = [
    {"cli"},
    {"planning", "evaluation"},
    {"training", "sampling", "convert"},
    {"data", "models", "parallel"},
    {"nn"},
]
# Of files, configs on disk and the command line, as far as an import tells.
OUTSIDE = {"argparse", "io", "json", "ml_collections", "os", "pathlib", "safetensors", "shutil"}
OUTSIDE |= {"errors", "provenance"}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(300, 200), (2, 129, 257), (0, 4), (7,), ()])
def test_contiguous(shape, dtype):
    a = np.random.default_rng(0).normal(size=shape).astype(dtype)
    views = [a, a.T, np.broadcast_to(a[:1] if a.ndim else a, a.shape)]
    if a.ndim > 1:
        views += [np.swapaxes(a, -1, -2), np.swapaxes(a, -1, -2)[..., 1:, ::2]]
    for view in views:
        copy = contiguous(view)
        assert copy.flags.c_contiguous and copy.dtype == a.dtype
        np.testing.assert_array_equal(copy, view)


def imported(source, package):
    """The modules that a file's text imports, those inside functions, too; absolute names."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def forbidden(part, names):
    """Those of the imported names that a part may not import."""
    places = {name: place for place, line in enumerate(LINES) for name in line}
    own = places[part]
    wrong = {above for line in LINES[:own] for above in line}
    if part == "evaluation":
        wrong.add("training")
    found = {n for n in names if n.startswith("starflow2_jax.") and n.split(".")[1] in wrong}
    if part in ("nn", "models"):
        ours = {n for n in names if n.startswith("starflow2_jax.") and n.split(".")[1] in OUTSIDE}
        found |= ours | {n for n in names if n.split(".")[0] in OUTSIDE}
    return found


def test_imports_run_downwards():
    root = pathlib.Path(starflow2_jax.__file__).parent
    parts = {path.name for path in root.iterdir() if (path / "__init__.py").is_file()}
    assert parts == set().union(*LINES)
    wrong, files = {}, 0
    for part in sorted(parts):
        for path in sorted((root / part).rglob("*.py")):
            package = ("starflow2_jax", *path.relative_to(root).parent.parts)
            names = imported(path.read_text(encoding="utf-8"), package)
            files += 1
            if found := forbidden(part, names):
                wrong[str(path.relative_to(root))] = sorted(found)
    assert not wrong and files > 100


def test_what_runs_upwards_is_seen():
    package = ("starflow2_jax", "evaluation")
    for source in (
        "from starflow2_jax.training.meter import Meter",
        "from starflow2_jax import training",
        "def f():\n    import starflow2_jax.training.step",
        "from ..training import loop",
        "from starflow2_jax.cli import main",
    ):
        assert forbidden("evaluation", imported(source, package)), source
    allowed = "from starflow2_jax.sampling import step\nfrom . import job\nimport json"
    assert not forbidden("evaluation", imported(allowed, package))
    assert forbidden("models", {"pathlib"}) and forbidden("nn", {"starflow2_jax.models.flow"})
    assert not forbidden("training", {"pathlib", "starflow2_jax.convert.table"})
