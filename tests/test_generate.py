"""Sampling's host side: batches, streams, stop strings, bad requests; and the way to x."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from sampling_cases import (
    CONFIG,
    END,
    END_OF_IMAGE,
    PROMPTS,
    SETTINGS,
    SLOTS,
    START,
    TOLERANCE,
    UNCONDITIONAL,
    C,
    N,
    batch,
    image,
    random_model,
    row_of,
    steered_model,
)

from starflow2_jax.errors import UserError
from starflow2_jax.sampling import display, generate, write
from starflow2_jax.sampling.prompts import Image, Text, extended, padded, scored
from starflow2_jax.sampling.state import row_settings
from starflow2_jax.sampling.step import choose_token
from starflow2_jax.sampling.text import TextPieces, until

pytestmark = pytest.mark.usefixtures("x64")


def test_limits_and_greedy_writing():
    model = steered_model(
        (1, (2,)), (2, (START, 5)), (END_OF_IMAGE, (3,)), (3, (START, 6)), (5, (7,)), (6, (END,)),
        (7, (END,)), (10, (11,)), (11, (10,)),
    )  # fmt: skip
    prompts = [row_of(Text(ids)) for ids in ((1,), (1,), (10,), (1, START))]
    settings = row_settings(
        4, temperature=0, max_new_tokens=[20, 20, 4, 0], max_images=[2, 0, 2, 1]
    )
    outputs = generate.generate(model, prompts, settings)
    assert [o.reason for o in outputs] == ["images", "end", "tokens", "images"]
    shown = [[p.tokens if isinstance(p, Text) else "u" for p in o.pieces] for o in outputs]
    assert shown == [[(2,), "u", (3,), "u"], [(2, 5, 7, END)], [(11, 10, 11, 10)], ["u"]]
    # A row goes on where its context ends, and no further.
    endless = row_settings(4, temperature=0, max_new_tokens=10**6, max_images=2)
    cut = generate.generate(model, [prompts[2]] * 4, endless, context=32)
    assert cut[0].reason == "context" and cut[0].pieces[0].tokens == (11, 10) * 15 + (11,)
    # Output pieces put behind the prompt are the row: it can be asked again.
    again = extended(prompts[0], outputs[0].pieces, CONFIG)
    assert len(again) == 1 + 1 + (N + 2) + 1 + (N + 2) and len(again.u) == 2


def test_a_stream_tells_in_order_and_stops_at_strings():
    model = steered_model((1, (2,)), (2, (START, 5)), (END_OF_IMAGE, (3,)), (3, (4,)), (4, (3,)))
    prompts = [row_of(Text(ids)) for ids in ((1,), (9, 1), (1,), (9, 1))]
    settings = row_settings(4, temperature=0, max_new_tokens=20, max_images=2)
    stop = generate.Stop(("434",), lambda ids: "".join(map(str, ids)))
    for every in (1, 3, 1000):
        events = list(generate.stream(model, prompts, settings, stop=stop, every=every))
        for b in range(4):
            mine = [e for e in events if e.row == b]
            assert mine[-1] == generate.DoneEvent(b, "stop")
            drawn = [i for i, e in enumerate(mine) if isinstance(e, generate.ImageEvent)]
            assert len(drawn) == 1 and mine[drawn[0]].u.shape == (N, C)
            text = lambda events: sum((e.tokens for e in events), ())
            assert text(mine[: drawn[0]]) == (2,)
            assert text(mine[drawn[0] + 1 : -1]) == (3, 4, 3, 4)
    outputs = generate.generate(model, prompts, settings, stop=stop)
    assert [o.reason for o in outputs] == ["stop"] * 4
    assert [len(o.pieces) for o in outputs] == [3] * 4


@pytest.mark.parametrize(
    "stop, given, shown",
    [
        ((), ["a", "b", " ", "c "], ["a", "b", "", " c", ""]),
        (("bcd",), ["ab", "c", "e", "bc", "d", "f"], ["a", "", "bce", "", "", "", ""]),
        (("bcd",), ["ab", "c"], ["a", "", "bc"]),
        (("x", " b"), ["a", " b"], ["a", "", ""]),
        (("\n", "ab"), ["a", "\nb"], ["", "a", ""]),
        (("é",), ["a\ufffd", "b"], ["", "a\ufffdb", ""]),
    ],
)
def test_text_comes_out_up_to_a_stop_string(stop, given, shown):
    """What may be its beginning is held back until it is known not to be, or the text ends."""
    pieces = TextPieces(lambda ids: "".join(given[i] for i in ids), stop)
    assert [*(pieces.more([n]) for n in range(len(given))), pieces.end()] == shown
    assert "".join(shown) == until("".join(given), stop).strip(" ")


def test_no_prompts():
    assert generate.generate(random_model(), [], row_settings(0)) == []


def test_padded_rows_and_sizes_change_nothing():
    model, names = random_model(), ("seed", "temperature", "max_new_tokens", "max_images")
    rows = [row_of(*PROMPTS[i % 4]) for i in range(17)]
    settings = row_settings(17, **{n: (SETTINGS[n] * 5)[:17] for n in names})
    outputs = generate.generate(model, rows, settings)
    assert len(outputs) == 17
    for i in range(4, 17):
        assert outputs[i].reason == outputs[i - 4].reason
        for ours, theirs in zip(outputs[i].pieces, outputs[i - 4].pieces, strict=True):
            if isinstance(ours, Text):
                assert ours == theirs
            else:
                tiny.close(ours.u, theirs.u, TOLERANCE)


def test_bad_requests_say_what_is_wrong():
    def refused(error, match, row=(1,), changes=None, rows=1, **options):
        settings = row_settings(rows, **({"max_new_tokens": 2} | (changes or {})))
        with pytest.raises(error, match=match):
            generate.generate(random_model(), [row_of(Text(row))], settings, **options)

    refused(ValueError, "settings of 2 rows for 1 prompts", rows=2)
    refused(ValueError, "guidance needs the unconditional row", changes={"guidance": 1.0})
    refused(ValueError, "must end with", unconditional=(1, 2))
    refused(ValueError, "must end with", unconditional=())
    noise = jnp.zeros((1, 1, N, C))
    refused(ValueError, "noise for 1 images of 2", changes={"max_images": 2, "noise": noise})
    for name, value in (
        ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("image_temperature", np.nan),
        ("guidance", -0.5), ("max_new_tokens", -1), ("max_images", -1),
    ):  # fmt: skip
        refused(UserError, f"{name} is {value}, expected a", changes={name: value})
    for name in ("temperature", "image_temperature", "guidance"):  # as the result of a cast
        infinite = dataclasses.replace(row_settings(1), **{name: np.array([np.inf])})
        with pytest.raises(UserError, match=f"{name} is inf, expected a finite number"):
            generate.check_settings(infinite, 1, CONFIG, UNCONDITIONAL, None)
    refused(UserError, "a stop string is empty", stop=generate.Stop(("a", ""), str))
    refused(UserError, "stop string .* no text", stop=generate.Stop(("\ud800",), str))
    refused(UserError, "prompt 0 is empty", row=())
    refused(UserError, "max_images is 0", row=(1, START), changes={"max_images": 0})
    refused(UserError, "prompt 0 has 9 positions, the context holds 8", row=range(9), context=8)
    refused(UserError, "its image need 9 positions", row=(1, 2, 3, START), context=8)
    refused(UserError, "guidance needs 7 positions", unconditional=UNCONDITIONAL, context=6)
    with pytest.raises(ValueError, match="LATENT positions"):
        padded([dataclasses.replace(row_of(image(0)), u=np.zeros((0, N, C)))])


def test_numbers_that_their_type_does_not_hold_are_refused_by_name():
    with jax.enable_x64(False):
        for name, value in (
            ("temperature", 1e39), ("image_temperature", np.inf), ("guidance", 10**400),
            ("max_new_tokens", 9999999999), ("max_images", [1, 2**31]), ("seed", -1),
            ("seed", [3, 2**32]), ("max_new_tokens", np.nan),
        ):  # fmt: skip
            with pytest.raises(UserError, match=f"{name} is .*, expected a number from"):
                row_settings(2, **{name: value})
            if name not in ("image_temperature", "guidance", "max_images"):
                with pytest.raises(UserError, match=f"{name} is"):
                    write.write_settings(2, (), **{name: value})
        kept = row_settings(2, temperature=3e38, max_new_tokens=2**31 - 1, seed=2**32 - 1)
        assert np.isfinite(kept.temperature).all() and kept.max_new_tokens[0] == 2**31 - 1
        assert kept.seed[0] == 2**32 - 1


def test_no_temperature_makes_a_forbidden_token_likely():
    """At 1e-38 every logit over it is infinite; nothing may be left but what is allowed."""
    logits = jnp.asarray([[-30.0, -20.0, -10.0, -40.0]], jnp.float32)
    allowed = jnp.asarray([[False, True, True, True]])
    for temperature in (1e-38, 1e-45, 3e38):
        token = choose_token(
            logits,
            allowed,
            jax.random.split(jax.random.key(0), 1),
            jnp.asarray([temperature], jnp.float32),
            jnp.ones(1, jnp.float32),
            jnp.ones(1, bool),
        )
        assert token[0] != 0 and (temperature > 1 or token[0] == 2)


def test_display_and_score():
    model = random_model()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, N, C)))
    u = display.to_u(model, x)
    tiny.close(display.to_x(model, u), x, TOLERANCE)
    row = row_of(Text((1, 2)), Image(u[0, 0]), Text((3,)), Image(u[0, 1]), Text((4,)))
    rows = scored(batch([row], SLOTS, 2))
    log_prob, gradient = display.score(model, rows, x)
    # What follows an image, another image too, does not enter its score.
    first = row_of(Text((1, 2)), Image(u[0, 0]))
    alone = display.score(model, scored(batch([first], SLOTS, 2)), x)
    tiny.close(log_prob[:, 0], alone[0][:, 0], TOLERANCE)
    tiny.close(gradient[:, 0], alone[1][:, 0], TOLERANCE)
    assert not alone[0][:, 1].any() and not alone[1][:, 1].any()
    tiny.close(display.denoise(model, rows, x, 0.3), x + 0.09 * gradient, TOLERANCE)
    h, direction = 1e-5, np.random.default_rng(2).normal(size=(N, C))
    up, down = (display.score(model, rows, x.at[0, 1].add(d * direction))[0] for d in (h, -h))
    tiny.close((up - down)[0, 1] / (2 * h), (gradient[0, 1] * direction).sum(), 1e-7)
