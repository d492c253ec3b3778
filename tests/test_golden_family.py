"""The golden numbers of TarFlow and STARFlow: the public release on tiny random models.

Every result is there in float64 and in float32; the weights go through the converter. Images of the
files have their channels first.
"""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from golden_files import files

from starflow2_jax.convert import starflow as convert
from starflow2_jax.models import starflow
from starflow2_jax.models.af_block import Given
from starflow2_jax.models.guidance import GaussianGuidance, LogScaleGuidance
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.sampling import jacobi

pytestmark = pytest.mark.golden

DTYPES = {"f64": np.float64, "f32": np.float32}
PARTS = {
    "starflow": {
        "forward": r"tokens|z|out\d+|logdet\d+|loss.*|wide_.*|guided_forward_.*|trace/.*",
        "gradients": r"grad_x|grad_norm_values|grad/.*|self_denoised",
        "samples": r"roundtrip|sample.*",
        "jacobi": r"jacobi_.*",
    },
    "tarflow": {
        "forward": r"patches|z.*|logdets.*|loss|out_block\d+|trace/.*|bpd.*",
        "gradients": r"grad_x|grad_norm_values|grad/.*|denoised",
        "samples": r"roundtrip|sample.*",
    },
}


def names(data, precision, pattern):
    prefix = f"{precision}/"
    found = (k.removeprefix(prefix) for k in data.files if k.startswith(prefix))
    return {name for name in found if re.fullmatch(pattern, name)}


@dataclasses.dataclass
class Case:
    """One file in one precision: `of(name)` is an input of it, images with channels last."""

    data: np.lib.npyio.NpzFile
    precision: str
    kind: str

    def __post_init__(self):
        arguments = json.loads(str(self.data["config_json"]))
        make = getattr(convert, f"{self.kind}_config")
        self.dtype = DTYPES[self.precision]
        self.config = make(arguments, dtype=np.dtype(self.dtype).name)
        tensors = {
            k[2:]: self.data[k].astype(self.dtype) for k in self.data.files if k.startswith("w/")
        }
        self.model = convert.from_tensors(self.config, tensors)

    def __contains__(self, name):
        return f"in/{name}" in self.data.files

    def raw(self, name):
        return self.data[f"in/{name}"].astype(self.dtype)

    def images(self, name):
        return jnp.asarray(last(self.raw(name)))

    @property
    def sigma(self):
        # Stored as float32, computed with as the decimal that it was written as.
        return float(str(self.data["in/sigma"]))

    def given(self, text="y", **more):
        """The text or the labels of that name, where the file has any."""
        if text not in self:
            return Given(**more)
        if self.kind == "tarflow":
            return Given(labels=jnp.asarray(self.data[f"in/{text}"], jnp.int32), **more)
        return Given(text=jnp.asarray(self.raw(text)), **more)


def last(images):
    return np.moveaxis(np.asarray(images), 1, -1)


def first(images):
    return np.moveaxis(np.asarray(images), -1, 1)


def flat(grid):
    """[B, h, w, C] -> [B, N, C]."""
    return np.asarray(grid).reshape(len(grid), -1, grid.shape[-1])


@pytest.fixture(params=["f64", "f32"])
def precision(request):
    with jax.enable_x64(request.param == "f64"):
        yield request.param


def parametrised(kind):
    return pytest.mark.parametrize("path", files(kind), ids=lambda p: p.stem)


def compare(case, ours, part):
    """All results of a part, and no others."""
    expected = names(case.data, case.precision, PARTS[case.kind][part])
    assert set(ours) == expected, set(ours) ^ expected
    for name, value in ours.items():
        golden = case.data[f"{case.precision}/{name}"]
        value = np.asarray(value)
        assert value.dtype == case.dtype, (name, value.dtype)
        limit = 1e-9
        if case.precision == "f32":
            limit = 1e-4 if name.startswith("grad") else 1e-5
        tiny.close(value, golden, limit, name)


def traces(case, model, x, given):
    """Activations inside blocks, layer by layer, without the scan."""
    recorded = names(case.data, case.precision, r"trace/.*")
    results = {}
    passed = model.forward(x, given)
    for k in sorted({int(re.match(r"trace/b(\d+)/", name)[1]) for name in recorded}):
        block, tokens = model.blocks[k], passed.outputs[k]
        b, h, w, c = tokens.shape
        u = tokens.reshape(b, h * w, c)[:, block.order]
        inputs = u
        if block.start is not None:
            inputs = jnp.concatenate([block.start_slot(b, u.dtype), u[:, :-1]], axis=1)
        put = functools.partial(lambda k, name, value: results.update({f"b{k}/{name}": value}), k)
        put("proj_in", block.proj_in(inputs))
        hidden = block.embed(inputs, 0, given, case.dtype)
        text = block.embed_text(given, case.dtype)
        length = 0
        if text is not None:
            put("proj_txt", text)
            hidden, length = jnp.concatenate([text, hidden], axis=1), text.shape[1]
        angles = case.config.angles(h, w, length, case.dtype)
        rotation = None if angles is None else (jnp.cos(angles), jnp.sin(angles))
        spec = AttentionSpec(temperature=given.temperature)
        for i in range(block.config.layers):
            layer = jax.tree.map(lambda a, i=i: a[i], block.decoder.layers)
            mixed, _ = layer.attention(layer.attention_norm(hidden), rotation, spec, None)
            put(f"layer{i}_attn", mixed)
            hidden = hidden + mixed
            change = layer.mlp(layer.mlp_norm(hidden))
            put(f"layer{i}_mlp", change)
            hidden = hidden + change
            put(f"layer{i}", hidden)
        if block.decoder.final_norm is not None:
            hidden = block.decoder.final_norm(hidden)
            put("final_norm", hidden[:, length:])
            put("final_norm_text", hidden[:, :length])
        put("proj_out", block.head.proj(hidden[:, length:]))
    results = {f"trace/{name}": value for name, value in results.items()}
    return {name: value for name, value in results.items() if name in recorded}


def input_of(case):
    return case.images("x_noisy" if "x_noisy" in case else "x")


@tiny.jit
def forward(model, x, given):
    passed = model.forward(x, given)
    sums = (passed.loss, passed.loss_prior, passed.loss_scale, passed.latent_norm)
    return passed, sums, passed.log_prob


def own_order(case, k, grid):
    """A block's raster tokens in its own order."""
    return flat(grid)[:, case.model.blocks[k].order]


def starflow_forward(case):
    x, given = input_of(case), case.given()
    passed, (loss, prior, scale, norm), _ = forward(case.model, x, given)
    results = {"z": first(case.config.unpatchify(passed.z)), "loss": loss}
    results |= {"loss_z": prior, "loss_logdet": scale}
    results |= {f"out{k}": out for k, out in enumerate(passed.outputs)}
    results |= {f"logdet{k}": own_order(case, k, d) for k, d in enumerate(passed.log_dets)}
    results |= {"tokens": passed.outputs[0], "loss_reg1e-4": loss + 1e-4 * norm}
    if "x_wide" in case:
        passed, sums, _ = forward(case.model, case.images("x_wide"), case.given("y_short"))
        results |= {"wide_z": first(case.config.unpatchify(passed.z)), "wide_loss": sums[0]}
    if "y_null" in case:
        guided = tiny.jit(lambda m, x, *a: m.forward(x, *a))
        passed = guided(case.model, x, given, GaussianGuidance(2.5), absent(case, len(x)))
        top = len(passed.log_dets) - 1
        results["guided_forward_z"] = first(case.config.unpatchify(passed.z))
        results["guided_forward_logdet_top"] = own_order(case, top, passed.log_dets[top])
        for name in ("guided_forward_z", "guided_forward_logdet_top"):
            results[name] = np.concatenate([results[name]] * 2)
    results |= tiny.jit(functools.partial(traces, case))(case.model, x, given)
    kept = names(case.data, case.precision, PARTS["starflow"]["forward"])
    # The smaller files lack some of these.
    return {n: v for n, v in results.items() if n in kept}


def absent(case, rows):
    """The unconditional rows of a guided STARFlow."""
    text = case.raw("y_null")
    return Given(text=jnp.asarray(np.repeat(text, rows, axis=0)))


def tarflow_forward(case):
    x, given = case.images("x"), case.given()
    passed, (loss, *_), _ = forward(case.model, x, given)
    log_dets = lambda passed: sum(d.mean((1, 2, 3)) for d in passed.log_dets)
    results = {"patches": flat(passed.outputs[0]), "z": flat(passed.z), "loss": loss}
    results["logdets"] = log_dets(passed)
    results |= {f"out_block{k}": flat(out) for k, out in enumerate(passed.outputs[1:])}
    if "y_dropped" in case:
        for name, labels in {"dropped": case.given("y_dropped"), "null": Given()}.items():
            passed, _, _ = forward(case.model, x, labels)
            results |= {f"z_{name}": flat(passed.z), f"logdets_{name}": log_dets(passed)}
    images, uniform = last(case.data["in/x_uint8"]), case.images("u")
    results["bpd_x"] = first(starflow.dequantised(images, uniform))
    results["bpd"] = tiny.jit(starflow.bits_per_dim)(case.model, images, uniform)
    return results | tiny.jit(functools.partial(traces, case))(case.model, x, given)


@parametrised("starflow")
def test_starflow_forward(path, precision):
    case = Case(np.load(path), precision, "starflow")
    compare(case, starflow_forward(case), "forward")


@parametrised("tarflow")
def test_tarflow_forward(path, precision):
    case = Case(np.load(path), precision, "tarflow")
    compare(case, tarflow_forward(case), "forward")


@tiny.jit
def gradients(model, x, given):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params, x: nnx.merge(graphdef, params, rest).forward(x, given).loss
    return jax.grad(loss, argnums=(0, 1))(params, x)


def gradient_results(case, x, sigma, denoised):
    of_params, of_x = gradients(case.model, x, case.given())
    tensors = convert.to_tensors(case.config, convert.by_path(of_params))
    order = [str(n) for n in case.data["grad_norm_names"]]
    assert sorted(order) == sorted(tensors)
    norms = np.array([np.linalg.norm(tensors[n]) for n in order], case.dtype)
    results = {"grad_x": first(of_x), "grad_norm_values": norms}
    small = {n: a for n, a in tensors.items() if f"{case.precision}/grad/{n}" in case.data}
    results |= {f"grad/{n}": a for n, a in small.items()}
    if sigma is not None:
        clean = tiny.jit(starflow.denoise)(case.model, x, sigma, case.given())
        results[denoised] = first(clean)
    return results


@parametrised("starflow")
def test_starflow_gradients(path, precision):
    case = Case(np.load(path), precision, "starflow")
    sigma = case.sigma if "sigma" in case else None
    compare(case, gradient_results(case, input_of(case), sigma, "self_denoised"), "gradients")


@parametrised("tarflow")
def test_tarflow_gradients(path, precision):
    case = Case(np.load(path), precision, "tarflow")
    compare(case, gradient_results(case, case.images("x"), case.sigma, "denoised"), "gradients")


@functools.partial(tiny.jit, static_argnames="invert")
def reverse(model, noise, *args, invert=starflow.sequential):
    return model.reverse(noise, *args, invert=invert)


def starflow_noise(case, name="noise"):
    return case.config.patchify(case.images(name))


def starflow_samples(case):
    image = lambda grid: first(case.config.unpatchify(grid))
    given, noise = case.given(), starflow_noise(case)
    passed, _, _ = forward(case.model, input_of(case), given)
    results = {"roundtrip": image(reverse(case.model, passed.z, given)[0][-1])}
    plain, _ = reverse(case.model, noise, given)
    wanted = names(case.data, case.precision, PARTS["starflow"]["samples"])
    for name in wanted - {"roundtrip"}:
        if name == "sample":
            results[name] = image(plain[-1])
        elif name.startswith("sample_seq"):
            results[name] = image(plain[int(name.removeprefix("sample_seq"))])
        elif name.startswith("sample_temp"):
            cooler = case.given(temperature=float(name.removeprefix("sample_temp")))
            results[name] = image(reverse(case.model, noise, cooler)[0][-1])
        elif name == "sample_tall":
            tall = starflow_noise(case, "noise_tall")
            results[name] = image(reverse(case.model, tall, given)[0][-1])
        elif match := re.fullmatch(r"sample_cfg([\d.]+)(_annealed)?", name):
            rule = GaussianGuidance(float(match[1]))
            case_args = (given, rule, absent(case, len(noise)))
            results[name] = image(reverse(case.model, noise, *case_args)[0][-1])
    return results


@parametrised("starflow")
def test_starflow_samples(path, precision):
    case = Case(np.load(path), precision, "starflow")
    compare(case, starflow_samples(case), "samples")


def tarflow_samples(case):
    image = lambda grid: first(case.config.unpatchify(grid))
    given, side = case.given(), case.config.side
    noise = jnp.asarray(case.raw("noise")).reshape(-1, side, side, case.raw("noise").shape[-1])
    passed, _, _ = forward(case.model, case.images("x"), given)
    results = {"roundtrip": image(reverse(case.model, passed.z, given)[0][-1])}
    plain, _ = reverse(case.model, noise, given)
    wanted = names(case.data, case.precision, PARTS["tarflow"]["samples"])
    for name in wanted - {"roundtrip"}:
        if name == "sample":
            results[name] = image(plain[-1])
        elif name.startswith("sample_seq"):
            results[name] = image(plain[int(name.removeprefix("sample_seq"))])
        elif match := re.fullmatch(r"sample_(ug|cfg)(_annealed|_b|_temp)?", name):
            rule = LogScaleGuidance(0.6, sigma=match[2] != "_b", annealed=match[2] == "_annealed")
            temperature = 0.7 if match[1] == "ug" else 0.8 if match[2] == "_temp" else None
            case_args = (given, rule, Given(temperature=temperature))
            results[name] = image(reverse(case.model, noise, *case_args)[0][-1])
    return results


@parametrised("tarflow")
def test_tarflow_samples(path, precision):
    case = Case(np.load(path), precision, "tarflow")
    compare(case, tarflow_samples(case), "samples")


@parametrised("starflow")
def test_starflow_jacobi(path, precision):
    case = Case(np.load(path), precision, "starflow")
    given, noise = case.given(), starflow_noise(case)
    tokens = noise.shape[1] * noise.shape[2]
    results = {}
    for name in names(case.data, precision, PARTS["starflow"]["jacobi"]):
        match = re.fullmatch(r"jacobi_(exact|th([\de.-]+)_block(\d+))(_cfg([\d.]+))?", name)
        config = jacobi.JacobiConfig(4, 0.0, 12)
        if match[1] != "exact":
            config = jacobi.JacobiConfig(int(match[3]), float(match[2]), 32)
        case_args = (given,)
        if match[5]:
            case_args = (given, GaussianGuidance(float(match[5])), absent(case, len(noise)))
        invert = jacobi.inverter(config)
        sequence, passes = reverse(case.model, noise, *case_args, invert=invert)
        results[name] = first(case.config.unpatchify(sequence[-1]))
        # Every pass but a chunk's last is rolled back.
        rolled_back = json.loads(str(case.data["jacobi_rollbacks_json"]))[f"{precision}/{name}"]
        chunks = -(-tokens // config.chunk)
        assert [int(p.sum()) for p in passes] == [len(r) + chunks for r in rolled_back], name
        for mine, theirs in zip(passes, rolled_back, strict=True):
            sizes = [min(config.chunk, tokens - config.chunk * i) for i in range(chunks)]
            assert np.repeat(sizes, np.asarray(mine) - 1).tolist() == theirs, name
    compare(case, results, "jacobi")


@pytest.mark.parametrize("kind", PARTS)
def test_every_result_is_compared(kind):
    for path in files(kind):
        data = np.load(path)
        for precision in DTYPES:
            parts = [names(data, precision, pattern) for pattern in PARTS[kind].values()]
            assert sum(map(len, parts)) == len(names(data, precision, r".*"))
            assert set.union(*parts) == names(data, precision, r".*")
