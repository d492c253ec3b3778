"""The golden numbers of the two streams: an independent float64 computation of the same model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import files

from starflow2_jax.convert import starflow2
from starflow2_jax.models.flow import FlowConfig
from starflow2_jax.models.pretzel import (
    Kind,
    PretzelConfig,
    Rows,
    SpecialTokens,
    bits_per_dim,
)
from starflow2_jax.models.qwen2_5_vl import LanguageModelConfig
from starflow2_jax.sampling import display, step
from starflow2_jax.sampling.prompts import Image, Text, extended, padded, scored
from starflow2_jax.sampling.state import Mode, row_settings
from starflow2_jax.training import objective

TOLERANCE = 1e-9

pytestmark = [pytest.mark.golden, pytest.mark.usefixtures("x64")]


def config_of(data):
    c = json.loads(str(data["config_json"]))
    v, f, t = c["vlm"], c["flow"], c["tokens"]
    assert c["gelu"] == c["adapter_gelu"] == "erf"
    vlm = LanguageModelConfig(
        vocab_size=v["vocab_size"],
        width=v["hidden_size"],
        layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        kv_heads=v["num_key_value_heads"],
        head_dim=v["head_dim"],
        mlp_width=v["intermediate_size"],
        tied=v["tie_word_embeddings"],
        rope_theta=v["rope_theta"],
        rms_norm_epsilon=v["rms_norm_eps"],
    )
    flow = FlowConfig(
        channels=f["channels"],
        side=c["image"]["side"],
        width=f["width"],
        head_dim=f["head_dim"],
        deep_layers=f["deep_layers"],
        shallow_layers=tuple(f["shallow_layers"]),
        shallow_orders=tuple(f["shallow_orders"]),
        mlp_ratio=f["mlp_ratio"],
        soft_clip=f["soft_clip"],
        rope_theta=f["rope_theta"],
        layer_norm_epsilon=f["layer_norm_eps"],
        rms_norm_epsilon=f["rms_norm_eps"],
    )
    special = SpecialTokens(t["vision_start"], t["vision_end"], t["image_pad"], t["eos"])
    return PretzelConfig(vlm, flow, special, dtype="float64"), c


def model_of(data, config, zero=()):
    tensors = {
        k[2:]: data[k].astype(np.float64) * (k[2:] not in zero)
        for k in data.files
        if k.startswith("w/")
    }
    return starflow2.from_tensors(config, tensors)


def rows_of(data):
    kinds = data["in/kinds"]
    return Rows(
        tokens=jnp.asarray(data["in/tokens"]),
        kinds=jnp.asarray(kinds),
        positions=jnp.asarray(data["in/positions"]),
        segments=jnp.asarray((kinds != Kind.PAD).astype(np.int32)),
        text_loss_mask=jnp.asarray(data["in/text_loss_mask"]),
        image_start=jnp.asarray(data["in/image_start"]),
        image_loss_mask=jnp.asarray(data["in/image_start"] >= 0),
    )


def images_at(row_values, image_start, tokens):
    """[B, T, C] at the positions of each image -> [B, I, N, C], zeros where there is none."""
    b, i = image_start.shape
    out = np.zeros((b, i, tokens, row_values.shape[-1]))
    for r, k in zip(*np.nonzero(image_start >= 0), strict=True):
        s = image_start[r, k]
        out[r, k] = row_values[r, s : s + tokens]
    return out


def close(ours, theirs, name, tolerance=TOLERANCE):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, name
    assert ours.dtype == np.float64, (name, ours.dtype)
    worst = np.abs(ours - theirs).max(initial=0.0)
    assert worst <= tolerance * max(1.0, np.abs(theirs).max(initial=0.0)), (name, worst)


def computed(model, data, config, weight_text):
    rows, x = rows_of(data), jnp.asarray(data["in/x"], jnp.float64)
    present = np.asarray(rows.image_start) >= 0
    likelihood = jax.jit(lambda m, r, x: m.log_prob(r, x))(model, rows, x)
    s, n = likelihood.streams, config.flow.tokens
    kinds = data["in/kinds"]
    alive = (kinds != Kind.PAD)[..., None]
    latent = np.zeros(kinds.shape, bool)
    latent[:, :-1] = kinds[:, 1:] == Kind.LATENT
    text = np.zeros(kinds.shape, bool)
    text[:, :-1] = kinds[:, 1:] == Kind.TEXT
    mu, sigma = model.deep.head(s.g)
    logits = model.logits(s.y, s.g)
    stack = lambda arrays: np.stack(
        [np.asarray(a) * present[..., None, None] for a in arrays], axis=2
    )
    loss_image = objective.image_loss(rows, likelihood)
    loss_text = objective.text_loss(rows, likelihood)
    logp = np.asarray(likelihood.image_log_prob)
    return {
        "shallow_out": stack(likelihood.shallow_outputs),
        "shallow_logdet": stack(likelihood.shallow_log_dets),
        "shallow_logdet_sum": stack(likelihood.shallow_log_dets).sum((-1, -2)),
        "u": stack(likelihood.shallow_outputs)[:, :, -1],
        "e": s.e * alive,
        "y": s.y * alive,
        "h": s.h * alive,
        "g": s.g * alive,
        "latent_pred_mask": latent,
        "text_pred_mask": text,
        "mu": mu * latent[..., None],
        "sigma": sigma * latent[..., None],
        "logits": logits * text[..., None],
        "z": images_at(np.asarray(likelihood.z), np.asarray(rows.image_start), n),
        "text_logp": likelihood.text_log_prob,
        "image_logp": logp,
        "bits_per_dim": np.asarray(bits_per_dim(logp, n * config.flow.channels)),
        "L_image": loss_image,
        "L_text": loss_text,
        "total": loss_image + weight_text * loss_text,
        "latent_norm": objective.latent_norm(rows, x, likelihood),
    }


@pytest.mark.parametrize("path", files("joint"), ids=lambda p: p.stem)
def test_every_joint_result(path):
    data = np.load(path)
    config, raw = config_of(data)
    results = computed(model_of(data, config), data, config, raw["lambda"])
    compared = set()
    for name, value in results.items():
        golden = data[f"out/{name}"]
        if golden.dtype == bool:
            np.testing.assert_array_equal(value, golden)
        else:
            close(value, golden, name)
        compared.add(f"out/{name}")
    zero = {"skip.vlm.weight", "skip.flow.weight", "adapter.2.weight", "adapter.2.bias"}
    start = computed(model_of(data, config, zero), data, config, raw["lambda"])
    for key in [k for k in data.files if k.startswith("out/stage_start/")]:
        close(start[key.rsplit("/", 1)[1]], data[key], key)
        compared.add(key)
    rest = {k for k in data.files if k.startswith("out/")} - compared
    assert all(k.startswith("out/grad") for k in rest), rest


@pytest.mark.parametrize("path", files("joint"), ids=lambda p: p.stem)
def test_every_gradient(path):
    data = np.load(path)
    config, raw = config_of(data)
    rows, x = rows_of(data), jnp.asarray(data["in/x"], jnp.float64)
    graphdef, frozen, trainable = nnx.split(
        model_of(data, config), nnx.PathContains("vlm"), nnx.Param
    )

    def loss(trainable, x, latent_norm):
        model = nnx.merge(graphdef, frozen, trainable)
        weights = objective.ObjectiveConfig(text=raw["lambda"], latent_norm=latent_norm)
        return objective.objective(model, rows, x, objective.Parts(), weights)[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))

    def tensors(latent_norm):
        of_params, of_x = gradient(trainable, x, latent_norm)
        return starflow2.to_tensors(config, starflow2.by_path(of_params)) | {"x": of_x}

    ours, regularised = tensors(0.0), tensors(1e-4)
    for key in data.files:
        if key.startswith("out/grad/"):
            close(ours[key[len("out/grad/") :]], data[key], key)
        if key.startswith("out/grad_reg/"):
            close(regularised[key[len("out/grad_reg/") :]], data[key], key)
    names = [str(n) for n in data["out/grad_probe_names"]]
    assert sorted(names) == sorted(set(ours) - {"x"})
    for name, golden in zip(names, data["out/grad_probe"], strict=True):
        flat = np.asarray(ours[name]).ravel()
        probe = [flat.sum(), np.linalg.norm(flat), flat @ np.cos(np.arange(flat.size))]
        close(np.array(probe), golden, name)


def sampled(model, config, data, guided):
    """The golden row, made by prefill and single steps: every result, by its name in the file."""
    n, n_text = config.flow.tokens, int(data["in/n_text"])
    prompt = extended(None, [Text(tuple(data["in/prompt"].tolist()))], config)
    noise = jnp.asarray(data["in/z"], jnp.float64)[None, None]
    settings = row_settings(
        1, guidance=float(data["in/w"]), max_new_tokens=n_text, max_images=1, noise=noise
    )
    state = step.prefill(
        model,
        padded([prompt]),
        settings,
        slots=len(prompt) + n + 1 + n_text,
        images=1,
        unconditional=jnp.asarray(data["in/uncond"]) if guided else None,
        record=True,
    )
    results = {name: [] for name in ("text_logits", "text_tokens")}
    heads, positions = [], [*prompt.positions]

    def place(kind):
        return step.element_positions(state, jnp.asarray([kind]), config.flow.side)[:, 0]

    for _ in range(n):
        assert state.mode.tolist() == [Mode.DRAW]
        heads.append(model.deep.head(state.g))
        positions.append(place(Kind.LATENT))
        state = step.advance(model, state, settings, 1)
    assert state.mode.tolist() == [Mode.CLOSE]
    positions.append(place(Kind.TEXT))
    state = step.advance(model, state, settings, 1)
    # The golden text is the likeliest of the whole vocabulary and knows no end: fed by hand.
    feed = jax.jit(step.feed)
    for _ in range(n_text):
        logits = model.logits(state.y[:1], state.g[:1])
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        results["text_logits"].append(logits[0])
        results["text_tokens"].append(int(token[0]))
        positions.append(place(Kind.TEXT))
        element = step.Element(token, jnp.full((1,), Kind.TEXT, jnp.int32), state.u[:, 0, 0])
        state = feed(model, state, element)
    if guided:
        mu, sigma = (np.stack([head[i] for head in heads]) for i in range(2))
        results |= {"mu_cond": mu[:, 0], "mu_uncond": mu[:, 1]}
        results |= {"sigma_cond": sigma[:, 0], "sigma_uncond": sigma[:, 1]}
    assert state.length.tolist() == [state.tokens.shape[1]]
    row = extended(prompt, [Image(state.u[0, 0]), Text(tuple(results["text_tokens"]))], config)
    np.testing.assert_array_equal(row.positions, np.stack(positions))
    rows, x = scored(padded([row])), display.to_x(model, state.u)
    log_prob, gradient = display.score(model, rows, x)
    denoised = display.denoise(model, rows, x, float(data["in/noise_std"]))
    return results | {
        "u": state.u[0, 0],
        "mu": state.record.mu[0, 0],
        "sigma": state.record.sigma[0, 0],
        "x": x[0, 0],
        "text_logits": np.stack(results["text_logits"]),
        "text_tokens": np.asarray(results["text_tokens"], np.int32),
        "row_kinds": state.kinds[0],
        "row_tokens": state.tokens[0],
        "row_positions": np.stack(positions, axis=1).astype(np.int32),
        "image_logp": log_prob[0, 0],
        "grad_x_logp": gradient[0, 0],
        "denoised": denoised[0, 0],
    }


@pytest.mark.parametrize("path", files("sample"), ids=lambda p: p.stem)
def test_every_sample_result(path):
    data = np.load(path)
    config, raw = config_of(data)
    assert raw["guidance"] == data["in/w"]
    model = model_of(data, config)
    compared = set()
    for name in ("plain", "guided"):
        for key, value in sampled(model, config, data, name == "guided").items():
            key = f"out/{name}/{key}"
            if data[key].dtype == np.int32:
                np.testing.assert_array_equal(value, data[key], key)
            else:
                close(value, data[key], key)
            compared.add(key)
    assert compared == {k for k in data.files if k.startswith("out/")}
