"""Mixtures as batches: weights, order over hosts, positions, corrupt records, packing."""

import itertools
import json
import logging

import grain
import numpy as np
import pytest
from source_files import MAKERS, SIDE, caption, is_number, write_tar

from starflow2_jax.data.batches import BatchIterator, SourceCounts, skipped_log
from starflow2_jax.data.mixture import Entry, Mixed, MixtureData, exact_counts, first_images
from starflow2_jax.data.pipeline import BatchShape, packed_batches
from starflow2_jax.data.sequences import ImageShape
from starflow2_jax.data.sources import WebDatasetSource
from starflow2_jax.data.tasks import Conversation, Draw, Read, Story
from starflow2_jax.data.tokenizer import train_tokenizer
from starflow2_jax.errors import UserError
from starflow2_jax.models.pretzel import Kind

SHAPE = ImageShape(SIDE, SIDE, 3, 2)
COUNT = 24
TASKS = {"webdataset": Draw("png"), "array_record": Read("png"), "parquet": Draw("png")}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [caption(number) for number in range(COUNT)] + ["describe this image what is"]
    return train_tokenizer(texts * 10, vocab_size=400)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {k: make(tmp_path_factory.mktemp(k), COUNT) for k, make in MAKERS.items()}


def data_of(tokenizer, entries, weights=None, **options):
    mixtures = {"joint": weights or dict.fromkeys(entries, 1.0)}
    return MixtureData(
        tokenizer=tokenizer,
        image=SHAPE,
        codec=None,  # batches are made without it
        entries=entries,
        mixtures=mixtures,
        threads=1,
        **options,
    )


@pytest.fixture(scope="module")
def data(tokenizer, sources):
    entries = {
        name: Entry(source, TASKS.get(name, Conversation()), held_out=4)
        for name, source in sources.items()
    }
    weights = {"webdataset": 3.0, "array_record": 2.0, "parquet": 1.0, "conversations": 2.0}
    return data_of(tokenizer, entries, weights)


BATCH = BatchShape(rows=8, length=64, images=4, lanes=4)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
        assert value.dtype == other[name].dtype
        np.testing.assert_array_equal(value, other[name])


def host_rows(hosts):
    each = BATCH.rows // hosts
    return [slice(host * each, host * each + each) for host in range(hosts)]


def joined(batches):
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


@pytest.fixture(scope="module")
def whole(data):
    iterator = iter(packed_batches(data.documents("joint", False, 5), BATCH))
    batches = take(iterator, 8)
    iterator.close()
    return batches


def test_weights_hold_over_ten_thousand_draws():
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    streams = [
        grain.MapDataset.range(1000 * k, 1000 * k + 1000).repeat() for k in range(len(weights))
    ]
    mixed = Mixed(streams, exact_counts(weights), 3)
    # Anywhere, and in every lane of a few, for which a periodic mixture would fail.
    for draws in (mixed[2345:12345], mixed[1:80001:8]):
        assert len(draws) == 10_000
        found = np.bincount([draws[i] // 1000 for i in range(10_000)], minlength=4)
        error = np.abs(found - 10_000 * weights)
        assert (error <= 4 * np.sqrt(10_000 * weights * (1 - weights))).all(), found
    # Each stream comes in its own order, without gaps.
    first = [mixed[i] for i in range(10_000)]
    seconds = [value for value in first if 1000 <= value < 2000]
    assert seconds == [1000 + i % 1000 for i in range(3000)]
    assert exact_counts([2, 1]).tolist() == [6667, 3333]


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, np.nan], []])
def test_weights_are_positive(weights):
    with pytest.raises(UserError, match="positive numbers"):
        exact_counts(weights)


def test_a_weight_too_small():
    with pytest.raises(UserError, match="less than one in 10000"):
        exact_counts([1.0, 1e-5])


def test_the_mixture_reads_all_kinds(data, whole):
    assert all(batch["tokens"].shape == (8, 64) for batch in whole)
    iterator = iter(packed_batches(data.documents("joint", False, 5), BATCH))
    take(iterator, 8)
    counts = iterator.counts()
    iterator.close()
    assert set(counts) == set(MAKERS)
    assert all(c.corrupt == c.unfit == 0 < c.seen for c in counts.values())


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_global_order_is_that_of_one_host(data, whole, hosts):
    # 8 hosts share the 4 lanes: two hosts read the same lane, and keep half of its rows.
    documents = data.documents("joint", False, 5)
    iterators = [iter(packed_batches(documents, BATCH, rows)) for rows in host_rows(hosts)]
    for expected in whole[:4]:
        assert_same(joined([next(iterator) for iterator in iterators]), expected)
    for iterator in iterators:
        iterator.close()


@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (2, 4)])
def test_another_number_of_hosts_continues_exactly(data, whole, before, after):
    documents = data.documents("joint", False, 5)
    iterators = [iter(packed_batches(documents, BATCH, rows)) for rows in host_rows(before)]
    for iterator in iterators:
        take(iterator, 3)
    # Through JSON, as checkpoints keep it; and reading ahead does not count.
    states = [json.loads(json.dumps(iterator.get_state())) for iterator in iterators]
    resumed = [iter(packed_batches(documents, BATCH, rows)) for rows in host_rows(after)]
    for iterator in resumed:
        iterator.set_states(states)
    for expected in whole[3:6]:
        assert_same(joined([next(iterator) for iterator in resumed]), expected)
    for iterator in iterators + resumed:
        iterator.close()


def test_an_iterator_is_set_back_and_starts_anew(data, whole):
    iterator = iter(packed_batches(data.documents("joint", False, 5), BATCH))
    start = iterator.get_state()
    take(iterator, 2)
    state = iterator.get_state()
    take(iterator, 2)
    for position, number in ((state, 2), (start, 0)):
        iterator.set_state(position)
        assert iterator.get_state() == position
        assert_same(next(iterator), whole[number])
    iterator.close()
    assert_same(next(iterator), whole[1])
    iterator.close()


def test_positions_of_other_data(data):
    documents = data.documents("joint", False, 5)
    iterator = iter(packed_batches(documents, BATCH))
    with pytest.raises(UserError, match=r"a batch of 2 lanes, but now it has 4"):
        iterator.set_state(iter(packed_batches(documents, BatchShape(8, 64, 4, 2))).get_state())
    half = iter(packed_batches(documents, BATCH, slice(0, 4)))
    with pytest.raises(UserError, match="position of lane 2 is missing"):
        iterator.set_state(half.get_state())
    with pytest.raises(UserError, match="8 rows cannot be dealt to 3 lanes"):
        packed_batches(documents, BatchShape(8, 64, 4, 3))


def test_batches_are_placed_ahead(data, whole):
    place = lambda batch: {name: value + 1 for name, value in batch.items() if name == "tokens"}
    iterator = iter(packed_batches(data.documents("joint", False, 5), BATCH, None, place))
    np.testing.assert_array_equal(next(iterator)["tokens"], whole[0]["tokens"] + 1)
    iterator.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing(tokenizer, sources, whole, data, workers):
    changed = data.documents("joint", False, 5)
    documents = type(changed)(changed.dataset, threads=2, workers=workers)
    iterator = iter(packed_batches(documents, BATCH))
    assert isinstance(iterator, BatchIterator)
    for expected in whole[:3]:
        assert_same(next(iterator), expected)
    state = iterator.get_state()
    iterator.close()
    plain = iter(packed_batches(changed, BATCH))
    plain.set_state(state)
    assert_same(next(plain), whole[3])
    plain.close()


def documents_of(batch):
    """The documents of a batch: tokens, and the numbers of the images' first pixels."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = np.flatnonzero(batch["segments"][row] == segment)
            inside = [i for i, s in enumerate(batch["image_start"][row]) if s in here]
            yield here, row, inside


def test_packing_keeps_documents_whole(data, whole, tokenizer):
    special, found = tokenizer.special, 0
    for batch in whole:
        for here, row, inside in documents_of(batch):
            assert (np.diff(here) == 1).all()
            tokens, kinds = batch["tokens"][row, here], batch["kinds"][row, here]
            turns = tokenizer.turns
            assert tokens[0] == tokenizer.encode_template(turns.user_open)[0]
            assert tokens[-1] == special.end
            assert (batch["positions"][row, here[0]] == 0).all()
            assert (kinds == Kind.LATENT).sum() == 4 * len(inside) == 4
            [image] = batch["images"][row, inside]
            [number] = [n for n in range(COUNT) if is_number(image, n)]
            text = tokenizer.decode(tokens)
            # Its own caption, or nothing where the text was dropped.
            assert f"number {number}" in text or len(tokens) == 4 + 5
            assert number >= 4  # the first ones are held out
            found += 1
    assert found > 60
    rate = np.mean([(batch["segments"] > 0).mean() for batch in whole])
    assert rate > 0.6


def test_text_is_dropped_from_drawings_only(tokenizer, sources):
    entries = {
        "draw": Entry(sources["webdataset"], Draw("png")),
        "read": Entry(sources["webdataset"], Read("png")),
    }
    dataset = data_of(tokenizer, entries, text_drop=0.3).documents("joint", False, 0).dataset
    made = [dataset[i] for i in range(600)]
    bare = {"draw": [], "read": []}
    for document in made:
        bare[document["source"]].append(len(document["tokens"]) == 4 + 5)
    assert not any(bare["read"])
    assert abs(np.mean(bare["draw"]) - 0.3) < 4 * np.sqrt(0.21 / len(bare["draw"]))
    seeds = [int(document["image_seeds"][0]) for document in made]
    assert len(set(seeds)) == len(seeds)


def test_held_out_records_are_others(data, tokenizer):
    for held_out, wanted in ((True, set(range(4))), (False, set(range(4, COUNT)))):
        dataset = data.documents("joint", held_out, 1).dataset
        found = set()
        for i in range(150):
            [image] = dataset[i]["images"]
            found |= {n for n in range(COUNT) if is_number(image, n)}
        assert found == wanted


def damaged(folder, every=4):
    """A shard in which some samples have a broken image, an empty caption or wrong JSON."""

    def change(number, fields):
        if number % every == 1:
            fields["png"] = fields["png"][:40]
        if number % every == 2:
            fields["txt"] = b" \n"
        if number % every == 3:
            fields["texts.json"] = b'["a", '
        fields.setdefault("texts.json", json.dumps(["a", None]).encode())
        fields["images.json"] = json.dumps([None, "png"]).encode()

    write_tar(folder / "0.tar", range(3 * every), change)
    path = folder / "0.tar"
    end = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(end - 10240)
    return WebDatasetSource(path)


def test_corrupt_records_are_skipped_counted_and_named(tokenizer, sources, tmp_path, caplog):
    broken = damaged(tmp_path)
    entries = {
        "good": Entry(sources["parquet"], Draw("png")),
        "draw": Entry(broken, Draw("png")),
        "story": Entry(broken, Story("texts.json", "images.json")),
    }
    data = data_of(tokenizer, entries, most_corrupt=1.0, text_drop=0.0)
    iterator = iter(packed_batches(data.documents("joint", False, 0), BATCH))
    log = tmp_path / "skipped.log"
    with caplog.at_level(logging.WARNING, "starflow2_jax.data.batches"), skipped_log(log):
        batches = take(iterator, 12)
    counts = iterator.counts()
    iterator.close()
    assert counts["good"].corrupt == 0 < counts["good"].seen
    shares = {name: counts[name].corrupt / counts[name].seen for name in ("draw", "story")}
    # Of 13 records 6 cannot be drawn, 6 are no story; one is what was cut off.
    assert all(0.3 < share < 0.65 for share in shares.values()), shares
    lines = [record.getMessage() for record in caplog.records]
    assert len(set(lines)) == len(lines) <= counts["draw"].corrupt + counts["story"].corrupt
    for source, record, why in (
        ("draw", "part/000001", "40 bytes that are no image"),
        ("draw", "part/000002", "field 'txt' is empty"),
        ("story", "part/000003", "field 'texts.json' is not JSON"),
        ("draw", "(damage)", "the rest is lost"),
    ):
        assert any(
            f"skipped a record of {source}: {tmp_path / '0.tar'}:{record}: " in line and why in line
            for line in lines
        ), (source, record, why)
    written = log.read_text().splitlines()
    assert [line.partition(" skipped ")[2] for line in written] == [
        line.partition("skipped ")[2] for line in lines
    ]
    # What is left is whole, and the counts are part of the position.
    for batch in batches:
        for here, row, _ in documents_of(batch):
            assert batch["tokens"][row, here[-1]] == tokenizer.special.end
    again = iter(packed_batches(data.documents("joint", False, 0), BATCH))
    again.set_state(iterator.get_state())
    next(again)
    more = again.counts()
    again.close()
    assert all(more[name].seen >= counts[name].seen for name in counts)
    assert more["good"].corrupt == 0


def test_too_many_corrupt_records_stop_the_run(tokenizer, sources, tmp_path):
    entries = {
        "good": Entry(sources["parquet"], Draw("png")),
        "bad": Entry(damaged(tmp_path), Draw("png")),
    }
    data = data_of(tokenizer, entries, most_corrupt=0.01)
    iterator = iter(packed_batches(data.documents("joint", False, 0), BATCH))
    message = r"source bad: (\d+) of \d+ records are corrupt, more than the share of 0.01"
    with pytest.raises(UserError, match=message):
        take(iterator, 100)
    # The share is of at least a thousand records: ten may be corrupt at the start.
    assert 10 < iterator.counts()["bad"].corrupt < 60
    iterator.close()


def test_a_source_of_nothing_but_corrupt_records_stops_the_run(tokenizer, tmp_path, sources):
    def change(number, fields):
        fields["txt"] = b""

    write_tar(tmp_path / "0.tar", range(9), change)
    entries = {"bad": Entry(WebDatasetSource(tmp_path / "0.tar"), Draw("png"))}
    good = {"good": Entry(sources["parquet"], Draw("png"))}
    data = data_of(tokenizer, good | entries, {"bad": 1.0}, most_corrupt=1.0)
    iterator = iter(packed_batches(data.documents("joint", False, 0), BatchShape(8, 64, 4)))
    with pytest.raises(UserError, match=r"bad: 1000 records in a row .*part/.* 'txt' is empty"):
        next(iterator)
    iterator.close()


def test_documents_that_no_row_holds_are_counted_apart(tokenizer, tmp_path):
    def change(number, fields):
        fields["txt"] = caption(number).encode() * (30 if number % 2 else 1)

    write_tar(tmp_path / "0.tar", range(20), change)
    data = data_of(tokenizer, {"a": Entry(WebDatasetSource(tmp_path / "0.tar"), Draw("png"))})
    iterator = iter(packed_batches(data.documents("joint", False, 0), BATCH))
    take(iterator, 6)
    counts = iterator.counts()["a"]
    iterator.close()
    assert counts.corrupt == 0 and 0.3 < counts.unfit / counts.seen < 0.6
    assert counts + counts == SourceCounts(2 * counts.seen, 0, 2 * counts.unfit)


def test_special_tokens_in_a_text_are_corrupt(tokenizer, tmp_path):
    def change(number, fields):
        if number >= 3:
            fields["txt"] = b"a <|vision_start|> b"

    write_tar(tmp_path / "0.tar", range(6), change)
    data = data_of(tokenizer, {"a": Entry(WebDatasetSource(tmp_path / "0.tar"), Draw("png"))})
    made = [data.documents("joint", False, 0).dataset[i] for i in range(40)]
    errors = {document["record"]: document["error"] for document in made if "error" in document}
    assert sorted(name.rpartition("/")[2] for name in errors) == ["000003", "000004", "000005"]
    assert all("special token <|vision_start|>" in error for error in errors.values())


def test_bad_mixtures(tokenizer, sources):
    entries = {"a": Entry(sources["webdataset"], Draw("png"))}
    with pytest.raises(UserError, match="stage joint has 'b', but the data sources are a"):
        data_of(tokenizer, entries, {"b": 1.0})
    with pytest.raises(UserError, match="24 records, of which 24 are held out"):
        data_of(tokenizer, {**entries, "c": Entry(sources["parquet"], Draw("png"), held_out=24)})
    data = data_of(tokenizer, entries)
    with pytest.raises(UserError, match="stage pretrain_lm has no mixture"):
        data.documents("pretrain_lm", False, 0)
    with pytest.raises(UserError, match="no data source of stage joint holds records out"):
        data.documents("joint", True, 0)
    images = first_images(Entry(sources["parquet"], Draw("png"), held_out=4), SHAPE, 3)
    assert images.dtype == np.uint8 and images.shape == (3, SIDE, SIDE, 3)
    assert all(is_number(image, number) for number, image in enumerate(images, 4))
    with pytest.raises(UserError, match="24 images can be read, but 30 are needed"):
        first_images(entries["a"], SHAPE, 30)
