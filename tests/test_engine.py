"""The engine: requests in company are requests alone, rows are reused, nothing is recompiled."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from sampling_cases import (
    CONFIG,
    PROMPTS,
    SETTINGS,
    START,
    TOLERANCE,
    UNCONDITIONAL,
    WEIGHTS,
    N,
    image,
    random_model,
    row_of,
    steered_model,
)

from starflow2_jax.errors import UserError
from starflow2_jax.parallel import rules
from starflow2_jax.parallel.mesh import serving_mesh
from starflow2_jax.sampling import generate, slots
from starflow2_jax.sampling.engine import Engine, EngineConfig, Request
from starflow2_jax.sampling.prompts import Image, Text, extended
from starflow2_jax.sampling.state import row_settings

SIZES = EngineConfig(rows=3, twins=2, context=64, images=2, chunk=24, chunks=2, steps=3)
TWO_GROUPS = dataclasses.replace(SIZES, rows=4, twins=2, groups=2)
FLOAT32 = dataclasses.replace(tiny.config("float32"), special=CONFIG.special)


def requests():
    """Reading, drawing with and without guidance, stories; two of each, of different seeds."""
    made = []
    for n in range(8):
        b = n % 4
        settings = {name: values[b] for name, values in SETTINGS.items()}
        settings |= {"seed": 100 + n, "guidance": WEIGHTS[b] if n < 6 else 0.0}
        made.append(Request(row_of(*PROMPTS[b]), **settings))
    return made


def outcome(events):
    """Of each request: its tokens and images in order, and why it ended."""
    pieces, reasons = collections.defaultdict(list), {}
    for event in events:
        assert event.row not in reasons
        if isinstance(event, generate.DoneEvent):
            reasons[event.row] = event.reason
        elif isinstance(event, generate.ImageEvent):
            pieces[event.row].append(event.u)
        elif pieces[event.row] and isinstance(pieces[event.row][-1], tuple):
            pieces[event.row][-1] += event.tokens
        else:
            pieces[event.row].append(event.tokens)
    return {number: (pieces[number], reason) for number, reason in reasons.items()}


def served(engine, many):
    """The outcomes in the order of the requests, which are all there from the start."""
    numbers = [engine.submit(request) for request in many]
    found = outcome(engine.run())
    return [found[number] for number in numbers]


def same(ours, theirs, exact=True, tolerance=TOLERANCE):
    assert ours[1] == theirs[1]
    assert len(ours[0]) == len(theirs[0])
    for a, b in zip(ours[0], theirs[0], strict=True):
        if exact or isinstance(a, tuple):
            np.testing.assert_array_equal(a, b)
        else:
            tiny.close(a, b, tolerance)


def make(model=None, config=SIZES, unconditional=UNCONDITIONAL, **options):
    return Engine(model or random_model(), config, unconditional=unconditional, **options)


def traced():
    return [f._cache_size() for f in (slots.read, slots.advance)]


@pytest.fixture(scope="module")
def single():
    """In float32, where an order of summation would show; twins are scarce."""
    model = tiny.pretzel(FLOAT32, seed=3)
    model.vlm.head[...] = model.vlm.head[...].at[START].multiply(6.0)
    engine = Engine(model, SIZES, unconditional=UNCONDITIONAL)
    engine.warm_up()
    return engine


def test_in_company_or_alone_the_bits_are_the_same_and_nothing_is_compiled_again(single):
    before, reads = traced(), single.reads
    together = served(single, requests())
    reads_together = single.reads - reads
    assert sum(isinstance(p, np.ndarray) for pieces, _ in together for p in pieces) > 4
    alone = [served(single, [request])[0] for request in requests()]
    # The prompts of several rows are read in one call.
    assert reads_together < single.reads - reads - reads_together
    # Other rows, other company: a request comes while others are under way.
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    waiting, numbers, events = [requests()[n] for n in order], [], []
    while waiting or single.busy:
        if waiting:
            numbers.append(single.submit(waiting.pop(0)))
        events += single.poll()
    found = outcome(events)
    for n, theirs in enumerate(alone):
        same(together[n], theirs)
        same(found[numbers[order.index(n)]], theirs)
    assert traced() == before


def test_groups_of_rows_give_the_bits_of_one_group():
    """Two groups are the programs of one of half the rows, side by side."""
    model = tiny.pretzel(FLOAT32, seed=3)
    engine = make(model, TWO_GROUPS)
    engine.warm_up()
    before = traced()
    together = served(engine, requests())
    assert all(group.fed for group in engine._groups)
    half = make(model, dataclasses.replace(SIZES, rows=2, twins=1, groups=1))
    for mine, theirs in zip(together, served(half, requests()), strict=True):
        same(mine, theirs)
    for mine, request in zip(together, requests(), strict=True):
        same(mine, served(engine, [request])[0])
    assert traced() == before
    with pytest.raises(UserError, match="3 rows cannot be shared out over 2 groups"):
        make(model, dataclasses.replace(TWO_GROUPS, rows=3))


def test_groups_know_what_was_kept_and_who_left():
    """A request goes on from its caches, whichever group has them and whatever that group does."""
    model = tiny.pretzel(FLOAT32, seed=3)
    engine = make(model, dataclasses.replace(TWO_GROUPS, steps=1))
    first = Request(row_of(Text((1, 2, START))), seed=4, guidance=1.0, max_images=1, keep=True)
    kept = served(engine, [first, dataclasses.replace(first, seed=5)])
    for n, (pieces, _) in enumerate(kept):
        others = [engine.submit(request) for request in requests()[:2]]
        engine.poll()
        row = extended(first.row, [Image(pieces[0]), Text((7, 8, 9 + n))], CONFIG)
        again = Request(row, temperature=1.0, max_new_tokens=6, max_images=0, reuse=True)
        before = engine.reused
        number = engine.submit(again)
        found = outcome(engine.run())
        assert set(found) == {*others, number}
        assert engine.reused - before == len(row) - 3
        [fresh] = served(make(model), [dataclasses.replace(again, reuse=False)])
        same(found[number], fresh, exact=False, tolerance=1e-4)
    numbers, events = [engine.submit(request) for request in requests()], engine.poll()
    for number in numbers:
        engine.cancel(number)
        events += engine.poll()
    reasons = [reason for _, reason in outcome([*events, *engine.run()]).values()]
    assert len(reasons) == len(numbers) and "cancelled" in reasons
    engine.cancel(numbers[0])  # long gone
    assert not engine.poll() and not engine.busy and not engine._cancelled


def test_requests_are_rows_of_a_batch(x64):
    """The engine gives what `generate` gives, prompts in pieces or not."""
    many = requests()
    config = dataclasses.replace(SIZES, chunk=4, rows=2, twins=1)
    ours = served(make(config=config), many)
    names = ["temperature", "top_p", "image_temperature", "max_new_tokens", "max_images"]
    picked = {name: [getattr(r, name) for r in many] for name in (*names, "seed", "guidance")}
    theirs = generate.generate(
        random_model(), [r.row for r in many], row_settings(len(many), **picked),
        unconditional=UNCONDITIONAL, context=config.context,
    )  # fmt: skip
    for mine, output in zip(ours, theirs, strict=True):
        parts = [p.tokens if isinstance(p, Text) else p.u for p in output.pieces]
        same(mine, (parts, output.reason), exact=False)


def test_what_was_drawn_is_not_read_again(x64):
    model = random_model()
    engine = make(model)
    first = Request(row_of(Text((1, 2, START))), seed=4, guidance=1.0, max_images=1, keep=True)
    [(pieces, reason)] = served(engine, [first])
    assert reason == "images" and engine.fed == 3
    question = Text((7, 8, 9))
    row = extended(first.row, [Image(pieces[0]), question], CONFIG)
    again = Request(
        row, seed=5, temperature=1.0, max_new_tokens=6, max_images=0, keep=True, reuse=True
    )
    # Others come and go in between; rows that keep nothing are taken first.
    served(engine, requests()[:2])
    fed = engine.fed
    [answer] = served(engine, [again])
    assert engine.fed - fed == len(question.tokens)
    assert engine.reused == len(row) - len(question.tokens)
    [fresh] = served(make(model), [dataclasses.replace(again, keep=False, reuse=False)])
    same(answer, fresh, exact=False)
    # A third turn that changes the question goes back to where they part.
    other = extended(first.row, [Image(pieces[0]), Text((7, 5))], CONFIG)
    fed = engine.fed
    [answer] = served(engine, [dataclasses.replace(again, row=other)])
    assert engine.fed - fed == 1
    [fresh] = served(make(model), [dataclasses.replace(again, row=other, keep=False, reuse=False)])
    same(answer, fresh, exact=False)
    # Another image is another prompt, behind the start that is the same.
    other = extended(first.row, [image(3), question], CONFIG)
    fed = engine.fed
    served(engine, [dataclasses.replace(again, row=other)])
    assert engine.fed - fed == len(other)


@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_not_finite_stays_with_its_request(monkeypatch, stacked):
    """Rows, their twins and what is kept of them give later requests the bits of a new engine."""
    if stacked:  # as on other devices than CPUs
        monkeypatch.setattr(slots, "for_decoding", lambda model: model)
    model = tiny.pretzel(FLOAT32, seed=3)
    sizes = dataclasses.replace(SIZES, rows=2, twins=1, images=1)
    draw = Request(row_of(Text((1, START))), guidance=1.0, max_images=1, keep=True)
    wild = [dataclasses.replace(draw, image_temperature=3e38, seed=n) for n in (0, 1)]
    later = [
        dataclasses.replace(draw, seed=2, reuse=True),
        Request(row_of(Text((3, 4))), seed=3, temperature=1.0, max_images=0, max_new_tokens=12),
        dataclasses.replace(draw, seed=4, guidance=0.0, keep=False),
    ]
    engine = make(model, sizes)
    for pieces, _ in served(engine, wild):
        assert not np.isfinite(pieces[0]).all()
    for mine, theirs in zip(served(engine, later), served(make(model, sizes), later), strict=True):
        assert all(np.isfinite(piece).all() for piece in theirs[0])
        same(mine, theirs)


def test_stop_strings_cancelling_and_refusals(x64):
    engine = make(steered_model((1, (2,)), (2, (3,)), (3, (1,))))
    stop = generate.Stop(("3 1",), lambda ids: " ".join(map(str, ids)))
    write = Request(row_of(Text((1,))), max_new_tokens=50, max_images=0)
    numbers = [
        engine.submit(r)
        for r in (dataclasses.replace(write, stop=stop), write, write, write, write)
    ]
    engine.cancel(numbers[4])  # queued
    events = engine.poll()
    engine.cancel(numbers[1])
    events += engine.run()
    found = outcome(events)
    assert found[numbers[0]] == ([(2, 3, 1)], "stop")
    assert found[numbers[4]] == ([], "cancelled")
    [tokens], reason = found[numbers[1]]
    assert reason == "cancelled" and tokens == (2, 3, 1)[: len(tokens)] and len(tokens) < 50
    assert [found[n][1] for n in numbers[2:4]] == ["tokens", "tokens"]
    # In the middle of an image its twin is free again.
    engine = make(random_model(), dataclasses.replace(SIZES, twins=1, steps=1))
    draw = Request(row_of(Text((1, START))), guidance=1.0, max_images=1, keep=True)
    number = engine.submit(draw)
    for _ in range(3):
        assert not engine.poll()
    engine.cancel(number)
    assert outcome(engine.run())[number] == ([], "cancelled")
    [(pieces, reason)] = served(engine, [draw])
    assert reason == "images" and pieces[0].shape[0] == N
    [(expected, _)] = served(make(random_model(), SIZES), [draw])
    tiny.close(pieces[0], expected[0], TOLERANCE)

    def refused(match, config=SIZES, unconditional=UNCONDITIONAL, **changes):
        with pytest.raises((UserError, ValueError), match=match):
            make(config=config, unconditional=unconditional).submit(
                dataclasses.replace(write, **changes)
            )

    refused("max_images is 3, this engine draws up to 2", max_images=3)
    refused("the context holds 64", row=row_of(Text((1,) * 65)))
    refused("top_p is", top_p=0.0)
    refused("guidance needs the unconditional row", unconditional=None, guidance=1.0)
    refused("guidance needs 7 positions", config=dataclasses.replace(SIZES, context=6))


@pytest.mark.distributed
@pytest.mark.slow
def test_on_a_mesh_the_rows_are_cut(x64):
    assert len(jax.devices()) == 8
    mesh = serving_mesh(4)
    config = dataclasses.replace(SIZES, rows=4, twins=4, groups=1)
    model = random_model()
    graphdef, state = nnx.split(model)
    places = rules.shardings(state, mesh, rules.SERVING)
    sharded = nnx.merge(graphdef, jax.device_put(state, places))
    engine = make(sharded, config, mesh=mesh)
    engine.warm_up()
    before = traced()
    for stored in jax.tree.leaves(engine._groups[0]._state.caches["vlm"]["k"]):
        assert len(stored.sharding.device_set) == 4
        assert not stored.sharding.is_fully_replicated
    ours = served(engine, requests())
    assert traced() == before
    for mine, theirs in zip(ours, served(make(model, config), requests()), strict=True):
        same(mine, theirs, exact=False)
    with pytest.raises(UserError, match="cannot be shared out"):
        make(sharded, SIZES, mesh=mesh)
