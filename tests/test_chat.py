"""Writing by a converted VLM: the same tokens as `transformers`, turns that reuse the cache."""

import dataclasses
import io
import json

import hf_folder
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from starflow2_jax.cli.main import main
from starflow2_jax.convert.qwen2_5_vl import import_folder
from starflow2_jax.data.sequences import Turn
from starflow2_jax.errors import UserError
from starflow2_jax.models.qwen2_5_vl import Qwen25VL
from starflow2_jax.nn.attention import AttentionSpec
from starflow2_jax.sampling import write
from starflow2_jax.sampling.prompts import Row
from starflow2_jax.sampling.write import Session, write_settings
from starflow2_jax.vlm import Assistant, Writing
from starflow2_jax.vlm_bundle import load_vlm


@pytest.fixture(scope="module")
def theirs():
    return hf_folder.hf_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, theirs):
    base = tmp_path_factory.mktemp("vlm")
    import_folder(hf_folder.write(base / "hf", theirs), base / "ours")
    return base / "ours"


@pytest.fixture(scope="module")
def assistant(folder):
    return Assistant.load(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    base = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (70, 60)), ("b.png", (56, 120))):
        PIL.Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(base / name)
    PIL.Image.new("RGB", (2100, 10)).save(base / "long.png")
    (base / "broken.png").write_bytes((base / "a.png").read_bytes()[:300])
    return base


def test_the_prompt_is_the_carried_template_of_it(folder, assistant):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "hf" / "tokenizer.json")
    )
    template = json.loads((folder / "hf" / "chat_template.json").read_text())["chat_template"]
    said = [("user", "one"), ("assistant", "two"), ("user", "three\n")]
    messages = [{"role": role, "content": text} for role, text in said]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    row = assistant.row([Turn(role, (text,)) for role, text in said])
    assert row.tokens.tolist() == list(expected)


def greedy(theirs, row, count):
    ids = torch.from_numpy(row.tokens[None].astype(np.int64))
    out = theirs.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return out[0, len(row) :].tolist()


def ours(assistant, rows, count, **options):
    session = Session(assistant.model)
    out = [[] for _ in rows]
    for event in session.stream(
        rows, write_settings(len(rows), (), max_new_tokens=count, **options)
    ):
        if isinstance(event, write.TextEvent):
            out[event.row] += event.tokens
        else:
            assert event.reason == "tokens"
    return out


def test_greedy_tokens_are_those_of_transformers(assistant, theirs):
    """Alone, and in a batch of rows of different lengths."""
    rows = [assistant.row([Turn("user", (t,))]) for t in ("hello", "a longer question", "?")]
    expected = [greedy(theirs, row, 64) for row in rows]
    assert len({tuple(e) for e in expected}) == 3
    assert ours(assistant, rows, 64) == expected
    assert ours(assistant, rows[:1], 64) == expected[:1]


def test_layers_apart_are_the_stack(folder):
    """On other devices than CPUs the stack decodes: both give the same."""
    stacked = load_vlm(folder).model
    apart = write.for_decoding(stacked)
    assert isinstance(apart, Qwen25VL) and len(apart.decoder.layers) == 2
    tokens = jnp.arange(12).reshape(2, 6)
    positions = jnp.broadcast_to(jnp.arange(6), (3, 2, 6))
    y = [
        m.decode(m.embed(tokens, jnp.float32), positions, AttentionSpec())[0]
        for m in (stacked, apart)
    ]
    assert np.abs(y[0] - y[1]).max() <= 1e-5 * max(1, np.abs(y[0]).max())


def test_random_streams_are_the_rows_own(assistant):
    rows = [assistant.row([Turn("user", (t,))]) for t in ("hello", "hello", "what")]
    options = {"seed": [3, 3, 4], "temperature": [1.0, 1.0, 1.0], "top_p": 0.9}
    first = ours(assistant, rows, 20, **options)
    assert first[0] == first[1] != first[2]
    alone = ours(assistant, rows[:1], 20, seed=[3], temperature=1.0, top_p=0.9)
    assert alone == first[:1]
    assert ours(assistant, rows[:1], 20, seed=[5], temperature=1.0, top_p=0.9) != alone
    with pytest.raises(UserError, match=r"top_p is 1\.5"):
        write_settings(1, (), top_p=1.5)


def test_turns_reuse_the_cache_and_say_what_a_fresh_start_says(assistant, pictures):
    chat = assistant.chat(Writing(max_new_tokens=12))
    replies = ["".join(chat.say("first", [pictures / "a.png"]))]
    prompt = chat.fed
    assert prompt == len(assistant.row(chat.turns[:1]))
    for text, images in (("second", []), ("third", [pictures / "b.png"])):
        before = chat.fed
        replies.append("".join(chat.say(text, images)))
        # The last prompt is not read again; of its reply at most what reads back otherwise.
        whole = len(assistant.row(chat.turns[:-1]))
        assert chat.fed - before <= whole - prompt
        prompt = whole
    for i, reply in enumerate(replies):
        [fresh] = assistant.answers([chat.turns[: 2 * i + 1]], Writing(max_new_tokens=12))
        assert fresh.text == reply, i
    assert len(set(replies)) > 1


def test_what_was_written_is_not_read_again(assistant):
    """In two rows of different lengths; a row that differs early is read from there."""
    rows = [assistant.row([Turn("user", (t,))]) for t in ("hello", "a longer question")]
    session = Session(assistant.model)
    settings = write_settings(2, (), max_new_tokens=9)

    def replies(rows):
        out = [[], []]
        for event in session.stream(rows, settings):
            out[event.row] += getattr(event, "tokens", ())
        return out

    def longer(row, ids):
        ends = row.positions[-1] + 1 + np.arange(len(ids))[:, None]
        return Row(
            np.concatenate([row.tokens, ids]),
            np.concatenate([row.kinds, np.ones(len(ids), np.int32)]),
            np.concatenate([row.positions, ends]),
            row.u,
        )

    first = replies(rows)
    assert session.fed == sum(map(len, rows))
    more = [longer(row, [*reply, 70, 71, 72]) for row, reply in zip(rows, first, strict=True)]
    before = session.fed
    second = replies(more)
    assert session.fed - before == 6
    assert second == ours(assistant, more, 9)
    changed = [more[0], dataclasses.replace(more[1], tokens=more[1].tokens.copy())]
    changed[1].tokens[5] += 1
    before = session.fed
    assert replies(changed) == ours(assistant, changed, 9)
    assert session.fed - before == 1 + len(changed[1]) - 5


def test_an_abandoned_reply_does_not_harm_the_next(assistant):
    chat = assistant.chat(Writing(max_new_tokens=30))
    stream = chat.say("hello")
    for _ in range(3):
        next(stream)
    stream.close()
    reply = "".join(chat.say("go on"))
    [fresh] = assistant.answers([chat.turns[:3]], Writing(max_new_tokens=30))
    assert fresh.text == reply


def test_the_context_ends_a_reply(folder, assistant):
    size = len(assistant.row([Turn("user", ("hello",))]))
    short = Assistant.load(folder, context=size + 5)
    [answer] = short.answers([[Turn("user", ("hello",))]])
    assert answer.reason == "context"
    [long] = assistant.answers([[Turn("user", ("hello",))]], Writing(max_new_tokens=5))
    assert long.reason == "tokens" and long.text == answer.text
    with pytest.raises(UserError, match=f"turn 1: .* positions, but the context holds {size + 4}"):
        next(short.chat().say("hello hello hello"))


def test_the_command(folder, pictures, tmp_path, capsys, monkeypatch, assistant):
    base = ["chat", "--model", str(folder), "--max-new-tokens", "8"]
    writing = Writing(max_new_tokens=8)
    picture = str(pictures / "a.png")
    assert main([*base, "--prompt", "hello", "--image", picture]) == 0
    said = capsys.readouterr().out
    [expected] = assistant.answers([[assistant.turn("hello", [picture])]], writing)
    assert said == expected.text + "\n"

    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {picture}\nhello\n\n<|im_end|>\nmore\n"))
    assert main(base) == 0
    talked = capsys.readouterr().out
    assert talked.startswith(said) and "special token <|im_end|>" in talked

    lines = [
        {"prompt": "hello", "images": [picture], "id": 7},
        {
            "messages": [
                {"role": "user", "text": "a"},
                {"role": "assistant", "text": "b"},
                {"role": "user", "text": "c"},
            ]
        },
        {"prompt": "x"},
    ]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main([*base, "--batch", str(file), "--out", str(out), "--rows", "2"]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [a["reason"] for a in answers] == ["tokens"] * 3
    assert answers[0]["reply"] == expected.text and answers[0]["id"] == 7

    capsys.readouterr()
    for extra, parts in {
        ("--prompt", "a", "--image", str(pictures / "long.png")): ("long.png", "200"),
        ("--prompt", "a", "--image", str(pictures / "broken.png")): ("broken.png", "cannot be"),
        ("--prompt", "a", "--image", str(pictures / "none.png")): ("none.png", "no such"),
        ("--prompt", "a" * 300, "--context", "100"): ("context holds 99",),
        ("--prompt", "a", "--out", "b"): ("--batch",),
        ("--prompt", "a", "--seed", "-1"): ("seed is -1",),
        ("--prompt", "a", "--max-new-tokens", "9999999999"): ("max_new_tokens is 9999999999",),
    }.items():
        assert main([*base, *extra]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        for part in parts:
            assert part in error
    for bad in ('{"prompt": 3}', "[]", "{", '{"messages": [{"role": "assistant", "text": "a"}]}'):
        file.write_text('{"prompt": "a"}\n' + bad)
        assert main([*base, "--batch", str(file)]) == 2
        said = capsys.readouterr()
        assert f"{file}:2" in said.err and said.err.count("\n") == 1 and not said.out
    for record, parts in (
        ({"prompt": "a", "images": [str(pictures / "long.png")]}, ("long.png", "200")),
        ({"prompt": "a", "images": [str(pictures / "broken.png")]}, ("broken.png", "cannot be")),
        ({"prompt": "a" * 600}, ("the context holds 511",)),
    ):
        file.write_text('{"prompt": "one\u2028line"}\n' + json.dumps(record), encoding="utf-8")
        assert main([*base, "--batch", str(file)]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and not said.out
        for part in (f"{file}:2", *parts):
            assert part in said.err
    assert main(["chat", "--model", str(tmp_path)]) == 2
    assert "model.json" in capsys.readouterr().err
