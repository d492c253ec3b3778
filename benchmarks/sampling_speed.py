"""Speed of sampling: batches, one decode step beside the bytes it reads, the engine, reuse.

    python benchmarks/sampling_speed.py --json FILE [--model runs/digits] [--only PART]

Without --model: random weights in the shapes of `configs/digits.py`. Times are medians of runs that
take turns with what they are compared to. Parts:

batch    tokens and images per second of whole batches of 1 to 64, guided or not, latent after
         latent and by Jacobi iteration
step     seconds of one engine step at 1 to 64 rows, and over the time in which this machine reads
         the same bytes (weights and caches) once
engine   64 mixed requests through 32 rows, and through a separately compiled engine of one row; how
         many give the same bits alone in the engine of 32
reuse    an answer about an image that was just drawn, with its caches and encoded anew from pixels;
         what that changes in the latents and the next logits, from latents x and from pixels
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from starflow2_jax.bundle import Bundle
from starflow2_jax.data import digits, emoji
from starflow2_jax.data.sequences import Turn, unconditional_prompt
from starflow2_jax.model import Model, Sampling, load
from starflow2_jax.models.fae_codec import FAECodec
from starflow2_jax.models.pretzel import Pretzel, spread_images
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.parallel.cpu import keep_freed_memory
from starflow2_jax.sampling import display, generate, slots
from starflow2_jax.sampling.engine import Engine, EngineConfig, Request
from starflow2_jax.sampling.jacobi import JacobiConfig
from starflow2_jax.sampling.prompts import padded
from starflow2_jax.sampling.state import Mode, row_settings
from starflow2_jax.service import Chat, Service

PAIRS, BATCHES, MANY, TOKENS, GUIDANCE = 3, (1, 4, 16, 64), 32, 32, 2.0
JACOBI = JacobiConfig(chunk=16, threshold=1e-2)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a model is asked that was trained on digits, or on emoji."""

    captions: tuple[str, ...]
    question: str
    story: str


DIGITS = Prompts(
    tuple(map(digits.caption, range(10))), "which digit is this?", "count up from three"
)
EMOJI = Prompts(
    ("grinning face", "red apple", "dog face", "rocket", "blue heart", "japan flag", "tulip"),
    emoji.QUESTION,
    "waving hand",
)


def prompts_of(model: Model) -> Prompts:
    """Those of the data that it knows."""
    return EMOJI if isinstance(model.bundle.codec, FAECodec) else DIGITS


def random_model() -> Model:
    """The digits' model before it was trained, its last layers random too."""
    path = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.copies = 0
    data = module.make_data(config)
    shape = module.make_model_config(config, data)
    graphdef, state = nnx.split(jax.jit(lambda: Pretzel(shape, rngs=nnx.Rngs(0)))())
    rng = np.random.default_rng(0)
    fill = lambda a: a if a.any() else jnp.asarray(0.02 * rng.normal(size=a.shape), a.dtype)
    model = nnx.merge(graphdef, jax.tree.map(fill, state))
    return Model(Bundle(model, data.codec, data.tokenizer, data.image, {}))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def taking_turns(*calls: Callable[[], Any], pairs: int = PAIRS) -> list[list[float]]:
    """Seconds of each call, run in turn after one call of each that compiles."""
    for call in calls:
        call()
    rounds = [[timed(call) for call in calls] for _ in range(pairs)]
    return [list(times) for times in zip(*rounds, strict=True)]


def row(name: str, value: float, unit: str, **more: Any) -> Row:
    """One result."""
    print(f"{name}: {value:.5g} {unit} {more or ''}", flush=True)
    return {"name": name, "value": value, "unit": unit, **more}


def batches(model: Model) -> Iterator[Row]:
    """Whole batches through `generate`."""
    unconditional = unconditional_prompt(model.tokenizer, model.bundle.image).tokens
    service = Service(model, EngineConfig(rows=1, context=64))
    known = prompts_of(model).captions
    for count in BATCHES:
        captions = [[Turn("user", (known[i % len(known)],))] for i in range(count)]
        write = [service.row(turns) for turns in captions]
        settings = row_settings(count, seed=3, max_new_tokens=TOKENS, max_images=0)
        written: list[int] = []

        def text(write: Any = write, settings: Any = settings, written: Any = written) -> None:
            outputs = generate.generate(model.pretzel, write, settings)
            written.append(sum(len(p.tokens) for out in outputs for p in out.pieces))

        [times] = taking_turns(text)
        rate = written[-1] / statistics.median(times)
        yield row(f"batch/{count}/text", rate, "tokens/s", rows=count)
        drawing = [service.row(turns, draw=True) for turns in captions]
        for guided in (False, True):
            weight = GUIDANCE if guided else 0.0
            settings = row_settings(count, seed=3, guidance=weight, max_new_tokens=0, max_images=1)
            given = {"unconditional": unconditional if guided else None}
            draw = lambda jacobi, d=drawing, s=settings, g=given: generate.generate(
                model.pretzel, d, s, jacobi=jacobi, **g
            )
            one, other = taking_turns(lambda: draw(None), lambda: draw(JACOBI))  # noqa: B023
            name = f"batch/{count}/images{'_guided' if guided else ''}"
            ratio = statistics.median(a / b for a, b in zip(one, other, strict=True))
            rate = count / statistics.median(one)
            yield row(f"{name}/sequential", rate, "images/s", rows=count)
            rate = count / statistics.median(other)
            yield row(f"{name}/jacobi", rate, "images/s", rows=count, ratio=ratio)


def bandwidth() -> float:
    """Bytes that a sum over a large array reads in a second."""
    big = jnp.ones((64, 2**20), jnp.float32)
    total = jax.jit(jnp.sum)
    [times] = taking_turns(lambda: total(big), pairs=7)
    return big.nbytes / statistics.median(times)


def steps(model: Model, count: int = 32) -> Iterator[Row]:
    """The engine's step with all rows drawing, or writing, at several numbers of rows."""
    config = model.pretzel.config
    weights = nnx.state((model.pretzel.vlm, model.pretzel.deep, model.pretzel.adapter))
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    for rows in BATCHES:
        decoder = slots.for_decoding(model.pretzel)
        state, settings = slots.empty(
            decoder, None, rows=rows, twins=0, slots=128, images=1 + count // config.flow.tokens
        )
        settings = row_settings(rows, max_new_tokens=10**6, max_images=10**6)
        halted = np.zeros(rows, bool)
        cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches))

        def begun(mode: Mode, state: Any = state, rows: int = rows) -> Any:
            at = {n: c | {"length": c["length"] + 8} for n, c in state.caches.items()}
            fresh = {"caches": at, "mode": jnp.full((rows,), mode, jnp.int32)}
            return jax.tree.map(jnp.copy, dataclasses.replace(state, **fresh))

        for mode in (Mode.WRITE, Mode.DRAW):
            steps_now = count if mode == Mode.WRITE else config.flow.tokens - 1
            times = []
            for _ in range(PAIRS + 1):
                fresh = jax.block_until_ready(begun(mode))
                fixed = settings, halted, np.int32(steps_now), np.int32(rows)
                run = functools.partial(slots.advance, decoder, fresh, *fixed)
                times.append(timed(run) / steps_now)
            seconds = statistics.median(times[1:])
            needed = (weight_bytes + cache_bytes) / bandwidth()
            name = f"step/{rows}/{mode.name.lower()}"
            more = {"bytes": weight_bytes + cache_bytes, "over_reading_them": seconds / needed}
            yield row(name, seconds * 1e3, "ms", per_row_ms=seconds * 1e3 / rows, **more)


def mixed(model: Model, service: Service, count: int = 64) -> list[Request]:
    """Reading, drawing with and without guidance, and stories."""
    rng = np.random.default_rng(0)
    image, known = model.bundle.image, prompts_of(model)
    shape = (image.height, image.width, image.channels)
    made = []
    for n in range(count):
        caption, seed = known.captions[n % len(known.captions)], 1000 + n
        if n % 4 == 0:
            picture = rng.integers(0, 256, shape, dtype=np.uint8)
            prompt = service.row([Turn("user", (picture, known.question))])
            made.append(Request(prompt, seed, max_new_tokens=8, max_images=0))
        elif n % 4 < 3:
            prompt = service.row([Turn("user", (caption,))], draw=True)
            weight = GUIDANCE if n % 4 == 1 else 0.0
            made.append(Request(prompt, seed, guidance=weight, max_new_tokens=0))
        else:
            story = service.row([Turn("user", (known.story,))], draw=True)
            more = {"max_new_tokens": 12, "max_images": 2, "guidance": GUIDANCE}
            made.append(Request(story, seed, temperature=1.0, **more))
    return made


def engine(model: Model) -> Iterator[Row]:
    """A stream of requests through many rows and through one."""
    empty = unconditional_prompt(model.tokenizer, model.bundle.image).tokens
    requests = mixed(model, Service(model, EngineConfig(rows=1, context=128)))
    image = model.pretzel.config.flow.tokens + 1
    # As `starflow2 sample` does: rows as long as the requests need.
    longest = max(len(r.row) + r.max_new_tokens + r.max_images * image for r in requests)
    context = generate.bucket(longest, 8)
    made = {
        rows: Engine(
            model.pretzel,
            # Half of the requests are guided.
            EngineConfig(
                rows=rows, twins=max(1, rows // 2), context=context, chunk=32, images=2, steps=4
            ),
            unconditional=empty,
        )
        for rows in (MANY, 1)
    }

    def serve(which: Engine, some: Sequence[Request]) -> list[list[bytes]]:
        """What each request gave, in bits."""
        numbers = [which.submit(request) for request in some]
        given: dict[int, list[bytes]] = {number: [] for number in numbers}
        for event in which.run():
            if isinstance(event, generate.ImageEvent):
                given[event.row].append(event.u.tobytes())
            elif isinstance(event, generate.TextEvent):
                # How a text is cut into events depends on when it is looked at.
                given[event.row] += [str(token).encode() for token in event.tokens]
        return [given[number] for number in numbers]

    for which in made.values():
        which.warm_up()
    traced = [f._cache_size() for f in (slots.read, slots.advance)]
    many, one = taking_turns(
        lambda: serve(made[MANY], requests), lambda: serve(made[1], requests), pairs=5
    )
    ratio = statistics.median(b / a for a, b in zip(many, one, strict=True))
    assert traced == [f._cache_size() for f in (slots.read, slots.advance)]
    rate = len(requests) / statistics.median(many)
    yield row(f"engine/{MANY}_rows", rate, "requests/s", ratio=ratio)
    yield row("engine/1_row", len(requests) / statistics.median(one), "requests/s")
    together = serve(made[MANY], requests[::-1])[::-1]
    alone = [serve(made[MANY], [request])[0] for request in requests]
    equal = sum(a == b for a, b in zip(together, alone, strict=True))
    assert traced == [f._cache_size() for f in (slots.read, slots.advance)]
    yield row("engine/bit_equal_alone", equal, f"of {len(requests)} requests")


def _errors(model: Model, chat: Chat) -> Iterator[Row]:
    """What the latents and the next logits would be, were the drawn image encoded anew."""
    service = chat.service
    [image] = chat.turns[1].parts
    drawing = [*chat.turns[:2], Turn("user", (prompts_of(model).question,))]
    whole = service.row(drawing)

    prompt = padded([whole])

    @jax.jit
    def run(model: Pretzel, u: jax.Array) -> jax.Array:
        spread = spread_images(u, prompt.image_start, prompt.tokens.shape[1])
        streams = model.run(prompt.tokens, prompt.kinds, prompt.positions, spread, AttentionSpec())
        return model.logits(streams.y[:, -1], streams.g[:, -1])

    def logits(u: np.ndarray) -> np.ndarray:
        return np.asarray(run(model.pretzel, jnp.asarray(u)[None]))

    kept = logits(whole.u)
    x = display.to_x(model.pretzel, jnp.asarray(whole.u))
    anew = {
        "latents": np.asarray(display.to_u(model.pretzel, x)),
        "pixels": model.latents(image[None], model.reading_seeds(1)),
    }
    for name, u in anew.items():
        largest = float(np.abs(whole.u).max())
        error = float(np.abs(u - whole.u).max())
        yield row(f"reuse/u_error/{name}", error, "largest", of=largest)
        error, largest = float(np.abs(logits(u) - kept).max()), float(np.abs(kept).max())
        yield row(f"reuse/logits_error/{name}", error, "largest", of=largest)


def reuse(model: Model) -> Iterator[Row]:
    """The first token of an answer about an image that was drawn."""
    sampling = Sampling(max_images=1, max_new_tokens=1)
    chat = model.chat(sampling, context=128)
    service, engine, known = chat.service, chat.service.engine, prompts_of(model)
    found: dict[str, list[tuple[float, int, int]]] = {"cached": [], "anew": []}

    def ask(chat: Chat) -> None:
        list(chat.say(known.question, max_images=0))

    def anew(chat: Chat) -> None:
        """The picture goes through the shallow flow and the whole conversation is read."""
        whole = service.row(chat.turns[:3])
        u = model.latents(chat.turns[1].parts[0][None], model.reading_seeds(1))
        again = dataclasses.replace(whole, u=u)
        service.submit(again, dataclasses.replace(sampling, max_images=0))
        while service.busy:
            service.poll()

    for _ in range(5 * PAIRS + 2):
        chat = Chat(service, sampling)
        list(chat.say(known.captions[3], draw=True))
        for name, call in (("cached", ask), ("anew", anew)):
            before = engine.fed, engine.reads
            seconds = timed(lambda: call(chat))  # noqa: B023
            found[name].append((seconds, engine.fed - before[0], engine.reads - before[1]))
    cached, other = found["cached"][2:], found["anew"][2:]
    ratio = statistics.median(b[0] / a[0] for a, b in zip(cached, other, strict=True))
    for name, times in (("cached", cached), ("encoded_anew", other)):
        seconds = statistics.median(t for t, _, _ in times)
        more = {"ratio": ratio} if name == "cached" else {}
        more |= {"positions": times[-1][1], "reading_calls": times[-1][2]}
        yield row(f"reuse/{name}", seconds * 1e3, "ms", **more)
    yield from _errors(model, chat)


PARTS = {"batch": batches, "step": steps, "engine": engine, "reuse": reuse}


def main() -> None:
    """Measures and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, required=True, help="file of the rows")
    parser.add_argument("--model", type=pathlib.Path, help="run on digits, emoji; default: random")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; default: all")
    args = parser.parse_args()
    keep_freed_memory()
    model = load(args.model) if args.model else random_model()
    rows: list[Row] = []
    for part in args.only or PARTS:
        for found in PARTS[part](model):
            rows.append(found)
            args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
