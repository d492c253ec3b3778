"""STARFlow2 parameters and flat names -> torch-layout arrays.

The VLM has its Hugging Face names behind `vlm.`, flow blocks those of the STARFlow family
(`shallow.{b}.`, `deep.`), the couplings `adapter.`, `skip.vlm`, `skip.flow`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from starflow2_jax.convert import layout
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig
from starflow2_jax.nn.decoder import DecoderConfig

Join = Callable[..., np.ndarray]
Split = Callable[[np.ndarray], tuple[np.ndarray, ...]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the source tensors that make it up.

    Attributes:
        path: attribute path inside `Pretzel`, dotted.
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


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _transposed(a: np.ndarray) -> np.ndarray:
    return a.T


def _plain(path: str, name: str, change: Callable = _same) -> Entry:
    return Entry(path, ((name,),), change, lambda a: (change(a),), stacked=False)


def _linear(path: str, name: str, bias: bool = True) -> Iterator[Entry]:
    yield _plain(f"{path}.kernel", f"{name}.weight", _transposed)
    if bias:
        yield _plain(f"{path}.bias", f"{name}.bias")


def _layers(
    path: str,
    prefix: str,
    depth: int,
    leaf: str,
    names: tuple[str, ...],
    join: Join = _same,
    split: Split | None = None,
) -> Entry:
    split = split or (lambda a: (join(a),))
    return Entry(
        f"{path}.layers.{leaf}",
        tuple(tuple(f"{prefix}.{i}.{name}" for name in names) for i in range(depth)),
        join,
        split,
        stacked=True,
    )


def _flow_decoder(path: str, name: str, c: DecoderConfig) -> Iterator[Entry]:
    def entry(leaf: str, source: str, join: Join = _same, split: Split | None = None) -> Entry:
        return _layers(path, f"{name}.attn_blocks", c.layers, leaf, (source,), join, split)

    def join(qkv: np.ndarray) -> np.ndarray:
        return layout.join_qkv(*np.split(qkv, 3), c.head_dim, adjacent_pairs=True)

    def split(joined: np.ndarray) -> np.ndarray:
        return np.concatenate(
            layout.split_qkv(joined, c.heads, c.kv_heads, c.head_dim, adjacent_pairs=True)
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
        yield entry(f"{ours}.kernel", f"{theirs}.weight", _transposed)
        yield entry(f"{ours}.bias", f"{theirs}.bias")
    yield _plain(f"{path}.final_norm.weight", f"{name}.final_norm.weight")


def _qwen_decoder(path: str, name: str, c: DecoderConfig) -> Iterator[Entry]:
    def entry(
        leaf: str, sources: tuple[str, ...], join: Join = _same, split: Split | None = None
    ) -> Entry:
        return _layers(path, f"{name}.layers", c.layers, leaf, sources, join, split)

    def join(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        return layout.join_qkv(q, k, v, c.head_dim, adjacent_pairs=False)

    def split(joined: np.ndarray) -> tuple[np.ndarray, ...]:
        return layout.split_qkv(joined, c.heads, c.kv_heads, c.head_dim, adjacent_pairs=False)

    yield entry("attention_norm.weight", ("input_layernorm.weight",))
    yield entry("mlp_norm.weight", ("post_attention_layernorm.weight",))
    qkv = tuple(f"self_attn.{p}_proj" for p in "qkv")
    yield entry(
        "attention.qkv.kernel",
        tuple(f"{n}.weight" for n in qkv),
        lambda *w: join(*w).T,
        lambda k: split(k.T),
    )
    yield entry("attention.qkv.bias", tuple(f"{n}.bias" for n in qkv), join, split)
    for ours, theirs in (
        ("attention.out", "self_attn.o_proj"),
        ("mlp.gate", "mlp.gate_proj"),
        ("mlp.up", "mlp.up_proj"),
        ("mlp.down", "mlp.down_proj"),
    ):
        yield entry(f"{ours}.kernel", (f"{theirs}.weight",), _transposed)
    yield _plain(f"{path}.final_norm.weight", f"{name}.norm.weight")


def table(config: PretzelConfig) -> list[Entry]:
    """Every parameter of a `Pretzel` and where it comes from."""
    flow, vlm = config.flow, config.vlm
    entries = [_plain("vlm.embedding", "vlm.model.embed_tokens.weight")]
    if not vlm.tied:
        entries.append(_plain("vlm.head", "vlm.lm_head.weight"))
    entries += _qwen_decoder("vlm.decoder", "vlm.model", vlm.decoder())
    for b, depth in enumerate(flow.shallow_layers):
        path, name = f"shallow.blocks.{b}", f"shallow.{b}"
        entries.append(
            Entry(
                f"{path}.start",
                ((f"{name}.sos_embed",),),
                np.ravel,
                lambda a: (a.reshape(1, 1, -1),),
                stacked=False,
            )
        )
        entries += _linear(f"{path}.proj_in", f"{name}.proj_in")
        entries += _flow_decoder(f"{path}.decoder", name, flow.decoder(depth))
        entries += _linear(f"{path}.head.proj", f"{name}.proj_out")
    entries += _linear("deep.proj_text", "deep.proj_text")
    entries += _linear("deep.proj_u", "deep.proj_u")
    entries += _flow_decoder("deep.decoder", "deep", flow.decoder(flow.deep_layers))
    entries += _linear("deep.head.proj", "deep.proj_out")
    entries += _linear("adapter.up", "adapter.0")
    entries += _linear("adapter.out", "adapter.2")
    entries += _linear("skip_vlm", "skip.vlm", bias=False)
    entries += _linear("skip_flow", "skip.flow", bias=False)
    return entries


def _path(key: tuple) -> str:
    return ".".join(str(part) for part in key)


def from_tensors(config: PretzelConfig, tensors: Mapping[str, np.ndarray]) -> Pretzel:
    """A `Pretzel` with these weights, in their dtype.

    Raises:
        ValueError: names that are missing or unknown, or shapes that differ; all of them at once.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Pretzel(config, rngs=nnx.Rngs(0))))
    flat = {_path(k): v for k, v in nnx.to_flat_state(abstract)}
    entries = table(config)
    wanted = {name for e in entries for group in e.names for name in group}
    problems = [f"missing: {n}" for n in sorted(wanted - set(tensors))]
    problems += [f"unknown: {n}" for n in sorted(set(tensors) - wanted)]
    problems += [f"never assigned: {p}" for p in sorted(set(flat) - {e.path for e in entries})]
    if problems:
        raise ValueError("weights do not fit the model:\n  " + "\n  ".join(problems))
    filled = {}
    for e in entries:
        parts = [e.join(*(np.asarray(tensors[n]) for n in group)) for group in e.names]
        value = np.stack(parts) if e.stacked else parts[0]
        if value.shape != flat[e.path].shape:
            problems.append(f"{e.path}: shape {value.shape}, expected {flat[e.path].shape}")
        filled[e.path] = flat[e.path].replace(jax.numpy.asarray(value))
    if problems:
        raise ValueError("weights do not fit the model:\n  " + "\n  ".join(problems))
    keys = {_path(k): k for k, _ in nnx.to_flat_state(abstract)}
    return nnx.merge(graphdef, nnx.from_flat_state({keys[p]: v for p, v in filled.items()}))


def to_tensors(config: PretzelConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by dotted path (parameters or their gradients) -> arrays by source name.

    Paths that are absent (parts that are frozen, say) are left out.
    """
    tensors = {}
    for e in table(config):
        if e.path not in params:
            continue
        value = np.asarray(params[e.path])
        for group, part in zip(e.names, value if e.stacked else [value], strict=True):
            tensors.update(zip(group, e.split(part), strict=True))
    return tensors


def by_path(state: nnx.State) -> dict[str, jax.Array]:
    """A state's arrays by dotted path."""
    return {_path(k): v[...] for k, v in nnx.to_flat_state(state)}
