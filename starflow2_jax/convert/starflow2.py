"""STARFlow2 parameters and flat names -> torch-layout arrays.

The VLM has its Hugging Face names behind `vlm.`, flow blocks those of the STARFlow family
(`shallow.{b}.`, `deep.`), the couplings `adapter.`, `skip.vlm`, `skip.flow`.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from starflow2_jax.convert import layout
from starflow2_jax.convert import table as tables
from starflow2_jax.convert.table import (
    Entry,
    Join,
    Split,
    af_block,
    by_path,
    family_decoder,
    layers,
    linear,
    plain,
    same,
    transposed,
)
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig
from starflow2_jax.models.qwen2_5_vision import VisionConfig
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig
from starflow2_jax.nn.decoder import DecoderConfig

__all__ = ["by_path", "from_tensors", "table", "to_tensors"]


def _qwen_decoder(path: str, name: str, c: DecoderConfig) -> Iterator[Entry]:
    def entry(
        leaf: str, sources: tuple[str, ...], join: Join = same, split: Split | None = None
    ) -> Entry:
        return layers(path, f"{name}.layers", c.layers, leaf, sources, join, split)

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
        yield entry(f"{ours}.kernel", (f"{theirs}.weight",), transposed)
    yield plain(f"{path}.final_norm.weight", f"{name}.norm.weight")


def _qwen_tower(path: str, name: str, config: VisionConfig) -> Iterator[Entry]:
    c = config.decoder()
    conv = (config.width, config.channels, config.frames, config.patch, config.patch)

    def entry(leaf: str, source: str, join: Join = same, split: Split | None = None) -> Entry:
        return layers(f"{path}.decoder", f"{name}.blocks", c.layers, leaf, (source,), join, split)

    def join(qkv: np.ndarray) -> np.ndarray:
        return layout.join_qkv(*np.split(qkv, 3), c.head_dim, adjacent_pairs=False)

    def split(joined: np.ndarray) -> np.ndarray:
        return np.concatenate(
            layout.split_qkv(joined, c.heads, c.kv_heads, c.head_dim, adjacent_pairs=False)
        )

    yield plain(
        f"{path}.patch_embedding.kernel",
        f"{name}.patch_embed.proj.weight",
        lambda w: w.reshape(len(w), -1).T,
        lambda k: k.T.reshape(conv),
    )
    yield entry("attention_norm.weight", "norm1.weight")
    yield entry("mlp_norm.weight", "norm2.weight")
    yield entry(
        "attention.qkv.kernel",
        "attn.qkv.weight",
        lambda w: join(w).T,
        lambda k: (split(k.T),),
    )
    yield entry("attention.qkv.bias", "attn.qkv.bias", join, lambda b: (split(b),))
    for ours, theirs in (
        ("attention.out", "attn.proj"),
        ("mlp.gate", "mlp.gate_proj"),
        ("mlp.up", "mlp.up_proj"),
        ("mlp.down", "mlp.down_proj"),
    ):
        yield entry(f"{ours}.kernel", f"{theirs}.weight", transposed)
        yield entry(f"{ours}.bias", f"{theirs}.bias")
    yield plain(f"{path}.decoder.final_norm.weight", f"{name}.merger.ln_q.weight")
    yield from linear(f"{path}.merge_up", f"{name}.merger.mlp.0")
    yield from linear(f"{path}.merge_out", f"{name}.merger.mlp.2")


def qwen(path: str, name: str, config: LanguageModelConfig) -> Iterator[Entry]:
    """A Qwen2.5-VL under the names of its published files."""
    yield plain(f"{path}embedding", f"{name}model.embed_tokens.weight")
    if not config.tied:
        yield plain(f"{path}head", f"{name}lm_head.weight")
    yield from _qwen_decoder(f"{path}decoder", f"{name}model", config.decoder())
    if config.vision is not None:
        yield from _qwen_tower(f"{path}tower", f"{name}visual", config.vision)


def table(config: PretzelConfig) -> list[Entry]:
    """Every parameter of a `Pretzel` and where it comes from."""
    flow, vlm = config.flow, config.vlm
    entries = list(qwen("vlm.", "vlm.", vlm))
    for b, depth in enumerate(flow.shallow_layers):
        entries += af_block(f"shallow.blocks.{b}", f"shallow.{b}", flow.block(depth))
    entries += linear("deep.proj_text", "deep.proj_text")
    entries += linear("deep.proj_u", "deep.proj_u")
    entries += family_decoder("deep.decoder", "deep", flow.decoder(flow.deep_layers), rotary=True)
    entries += linear("deep.head.proj", "deep.proj_out")
    entries += linear("adapter.up", "adapter.0")
    entries += linear("adapter.out", "adapter.2")
    entries += linear("skip_vlm", "skip.vlm", bias=False)
    entries += linear("skip_flow", "skip.flow", bias=False)
    return entries


def from_tensors(config: PretzelConfig, tensors: Mapping[str, np.ndarray]) -> Pretzel:
    """A `Pretzel` with these weights, in their dtype.

    Raises:
        ValueError: names that are missing or unknown, or shapes that differ; all of them at once.
    """
    return tables.from_tensors(lambda: Pretzel(config, rngs=nnx.Rngs(0)), table(config), tensors)


def to_tensors(config: PretzelConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by dotted path (parameters or their gradients) -> arrays by source name.

    Paths that are absent (parts that are frozen, say) are left out.
    """
    return dict(tables.to_tensors(table(config), params))
