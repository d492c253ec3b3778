"""Tables of parameters and the source tensors that make them up, and what is done with a table.

A table lists every parameter of a model once. From it follow: a model from tensors, tensors from a
model, and the full list of what does not fit.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from starflow2_jax.convert import layout
from starflow2_jax.models.af_block import BlockConfig
from starflow2_jax.nn.decoder import DecoderConfig

Join = Callable[..., np.ndarray]
Split = Callable[[np.ndarray], tuple[np.ndarray, ...]]
Model = TypeVar("Model", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the source tensors that make it up.

    Attributes:
        path: attribute path inside the model, dotted.
        names: source tensors, layer by layer where the parameter is stacked.
        join: source tensors (of one layer) to one array in our layout.
        split: the inverse.
        stacked: the parameter has a leading layer axis, each layer made of len(names) / L tensors.
    """

    path: str
    names: tuple[tuple[str, ...], ...]
    join: Join
    split: Split
    stacked: bool


def same(a: np.ndarray) -> np.ndarray:
    """As it is."""
    return a


def transposed(a: np.ndarray) -> np.ndarray:
    """Torch's [out, in] to our [in, out], and back."""
    return a.T


def plain(path: str, name: str, change: Callable = same, back: Callable | None = None) -> Entry:
    """One parameter from one tensor; `back` where `change` is not its own inverse."""
    back = back or change
    return Entry(path, ((name,),), change, lambda a: (back(a),), stacked=False)


def linear(path: str, name: str, bias: bool = True) -> Iterator[Entry]:
    """A `Linear`."""
    yield plain(f"{path}.kernel", f"{name}.weight", transposed)
    if bias:
        yield plain(f"{path}.bias", f"{name}.bias")


def layers(
    path: str,
    prefix: str,
    depth: int,
    leaf: str,
    names: tuple[str, ...],
    join: Join = same,
    split: Split | None = None,
) -> Entry:
    """One parameter of all layers of a decoder; layer i is made of `prefix`.i.`names`."""
    split = split or (lambda a: (join(a),))
    return Entry(
        f"{path}.layers.{leaf}",
        tuple(tuple(f"{prefix}.{i}.{name}" for name in names) for i in range(depth)),
        join,
        split,
        stacked=True,
    )


def family_decoder(path: str, name: str, c: DecoderConfig, rotary: bool) -> Iterator[Entry]:
    """The family's transformer: `name`.attn_blocks, `name`.final_norm."""

    def entry(leaf: str, source: str, join: Join = same, split: Split | None = None) -> Entry:
        return layers(path, f"{name}.attn_blocks", c.layers, leaf, (source,), join, split)

    def join(qkv: np.ndarray) -> np.ndarray:
        return layout.join_qkv(*np.split(qkv, 3), c.head_dim, adjacent_pairs=rotary)

    def split(joined: np.ndarray) -> np.ndarray:
        return np.concatenate(
            layout.split_qkv(joined, c.heads, c.kv_heads, c.head_dim, adjacent_pairs=rotary)
        )

    for ours, theirs in (("attention_norm", "attention.norm"), ("mlp_norm", "mlp.norm")):
        yield entry(f"{ours}.scale", f"{theirs}.weight")
        yield entry(f"{ours}.bias", f"{theirs}.bias")
    yield entry(
        "attention.qkv.kernel",
        "attention.qkv.weight",
        lambda w: join(w).T,
        lambda k: (split(k.T),),
    )
    yield entry("attention.qkv.bias", "attention.qkv.bias", join, lambda b: (split(b),))
    for ours, theirs in (
        ("attention.out", "attention.proj"),
        ("mlp.up", "mlp.main.0"),
        ("mlp.down", "mlp.main.2"),
    ):
        yield entry(f"{ours}.kernel", f"{theirs}.weight", transposed)
        yield entry(f"{ours}.bias", f"{theirs}.bias")
    if c.final_norm != "none":
        yield plain(f"{path}.final_norm.weight", f"{name}.final_norm.weight")


def af_block(path: str, name: str, config: BlockConfig) -> Iterator[Entry]:
    """An AF block under the family's names."""
    if config.start:
        yield plain(f"{path}.start", f"{name}.sos_embed", np.ravel, lambda a: a.reshape(1, 1, -1))
    if config.positions:
        yield plain(f"{path}.positions", f"{name}.pos_embed")
    if config.classes:
        yield plain(
            f"{path}.classes", f"{name}.class_embed", lambda a: a[:, 0], lambda a: a[:, None]
        )
    if config.text_width:
        yield from linear(f"{path}.proj_text", f"{name}.proj_txt")
    yield from linear(f"{path}.proj_in", f"{name}.proj_in")
    rotary = not config.positions
    yield from family_decoder(f"{path}.decoder", name, config.decoder(), rotary)
    yield from linear(f"{path}.head.proj", f"{name}.proj_out")


def _path(key: tuple) -> str:
    return ".".join(str(part) for part in key)


def by_path(state: nnx.State) -> dict[str, jax.Array]:
    """A state's arrays by dotted path."""
    return {_path(k): v[...] for k, v in nnx.to_flat_state(state)}


def shapes_in(state: nnx.State) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a state, by dotted path."""
    return {_path(k): tuple(v.shape) for k, v in nnx.to_flat_state(state)}


def shapes_of(make_model: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model that is not made, by dotted path."""
    return shapes_in(nnx.state(nnx.eval_shape(make_model)))


def source_shapes(
    entries: Sequence[Entry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of every source tensor, from the shapes of the parameters."""
    wanted = {}
    for e in entries:
        shape = shapes[e.path][1:] if e.stacked else shapes[e.path]
        # One byte stands for all, so that a transpose costs nothing and a permutation little.
        parts = e.split(np.broadcast_to(np.zeros((), np.int8), shape))
        for group in e.names:
            wanted |= {name: part.shape for name, part in zip(group, parts, strict=True)}
    return wanted


def misfits(
    entries: Sequence[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Everything in which tensors of these shapes do not make up a model of those; sorted.

    Raises:
        ValueError: the table itself does not assign each parameter exactly once.
    """
    paths = [e.path for e in entries]
    if sorted(paths) != sorted(shapes):
        wrong = set(paths) ^ set(shapes) or {p for p in paths if paths.count(p) > 1}
        raise ValueError(f"the table and the model differ in {sorted(wrong)}")
    wanted = source_shapes(entries, shapes)
    problems = [f"missing: {name}" for name in sorted(set(wanted) - set(tensors))]
    problems += [f"unknown: {name}" for name in sorted(set(tensors) - set(wanted))]
    problems += [
        f"wrong shape: {name} is {tuple(tensors[name])}, expected {wanted[name]}"
        for name in sorted(set(wanted) & set(tensors))
        if tuple(tensors[name]) != wanted[name]
    ]
    return problems


def refuse(problems: Sequence[str]) -> None:
    """Raises a ValueError that lists the problems, if there are any."""
    if problems:
        raise ValueError("weights do not fit the model:\n  " + "\n  ".join(problems))


def from_tensors(
    make_model: Callable[[], Model], entries: Sequence[Entry], tensors: Mapping[str, np.ndarray]
) -> Model:
    """The model with these weights, in their dtype.

    Raises:
        ValueError: names that are missing or unknown, or shapes that differ; all of them at once.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(make_model))
    leaves = {_path(k): (k, v) for k, v in nnx.to_flat_state(abstract)}
    shapes = {path: tuple(leaf.shape) for path, (_, leaf) in leaves.items()}
    refuse(misfits(entries, shapes, {name: np.shape(a) for name, a in tensors.items()}))
    flat = []
    for e in entries:
        parts = [e.join(*(np.asarray(tensors[n]) for n in group)) for group in e.names]
        value = np.stack(parts) if e.stacked else parts[0]
        key, leaf = leaves[e.path]
        flat.append((key, leaf.replace(jax.numpy.asarray(value))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def to_tensors(
    entries: Sequence[Entry], params: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays by dotted path (parameters or their gradients) -> source names and arrays, in turn.

    Paths that are absent (parts that are frozen, say) are left out.
    """
    for e in entries:
        if e.path not in params:
            continue
        value = np.asarray(params[e.path])
        for group, part in zip(e.names, value if e.stacked else [value], strict=True):
            yield from zip(group, e.split(part), strict=True)
