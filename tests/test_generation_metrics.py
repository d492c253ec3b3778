"""FID, KID, CLIP score and the benchmarks' summaries against public computations."""

import io
import json
import pathlib

import inception_case
import numpy as np
import pytest
import safetensors.numpy
import scipy.linalg
import tiny
import tokenizers
import torch
import transformers
from PIL import Image

from starflow2_jax.cli.main import main
from starflow2_jax.convert.clip import load_clip
from starflow2_jax.convert.inception import load_inception
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.benchmark_scores import geneval_summary, wise_summary
from starflow2_jax.evaluation.clip_score import clip_scores
from starflow2_jax.evaluation.distances import (
    Statistics,
    frechet_distance,
    inception_features,
    kernel_distance,
    statistics,
)
from starflow2_jax.evaluation.generation import captioned, read_statistics
from starflow2_jax.models.inception import resized


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    safetensors.numpy.save_file(inception_case.state(), path)
    return path


@pytest.mark.slow
def test_features_are_those_of_torch_fidelity(inception_file):
    kept = pathlib.Path(__file__).with_name("inception_features.json").read_text(encoding="utf-8")
    expected = np.array(json.loads(kept)["features"])
    pixels = np.stack([resized(image) for image in inception_case.images()])
    run = tiny.jit(lambda model, pixels: model(pixels))
    found = np.asarray(run(load_inception(inception_file), pixels))[:, :: inception_case.EVERY]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    state = inception_case.state()
    del state["Mixed_7c.branch1x1.conv.weight"]
    state["more"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(state, path)
    with pytest.raises(UserError, match=r"missing: Mixed_7c.branch1x1.conv.weight; unknown: more"):
        load_inception(path)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIP with random weights, as `transformers` writes one."""
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)],
    )
    backend.save(str(folder / "tokenizer.json"))
    small = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.CLIPConfig(
        text_config={
            **small,
            "hidden_size": 48,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "eos_token_id": 1,
            "bos_token_id": 0,
        },
        vision_config={
            **small,
            "hidden_size": 64,
            "image_size": 32,
            "patch_size": 8,
            "hidden_act": "gelu",
        },
        projection_dim=40,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for tensor in model.parameters():  # zeros and ones, too
        torch.nn.init.normal_(tensor, tensor.mean().item(), 0.1)
    model.save_pretrained(folder)
    return folder


CAPTIONS = ["a three", "two of them", "far more words than its context has room for"]


@pytest.mark.parity
def test_clip_score_is_that_of_transformers(clip_folder):
    clip = load_clip(clip_folder)
    reference = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    rng = np.random.default_rng(0)
    sizes = ((32, 32), (50, 71), (200, 90))
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    prepare = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    pixels = prepare([Image.fromarray(i) for i in images], return_tensors="pt")["pixel_values"]
    found = np.stack([clip.prepared(image) for image in images])
    np.testing.assert_allclose(found, pixels.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-5)
    tokens, lengths = clip.encoded(CAPTIONS)
    assert lengths.tolist() == [9, 13, 16] and tokens[2, 15] == 1
    with torch.no_grad():
        out = reference(input_ids=torch.from_numpy(tokens).long(), pixel_values=pixels)
    ours = np.asarray(clip.model.embed_text(tokens, lengths))
    np.testing.assert_allclose(ours, out.text_embeds.numpy(), rtol=0, atol=1e-5)
    ours = np.asarray(clip.model.embed_images(found))
    np.testing.assert_allclose(ours, out.image_embeds.numpy(), rtol=0, atol=1e-5)
    cosines = (out.text_embeds * out.image_embeds).sum(-1).numpy()
    expected = 100 * np.maximum(cosines, 0)
    found = clip_scores(clip, images, CAPTIONS, rows=2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert np.ptp(cosines) > 0.02


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    means = rng.normal(size=(2, 6))
    one, other = (Statistics(m, (basis * v) @ basis.T) for m, v in zip(means, (a, b), strict=True))
    # Covariances that commute: the distance of their deviations.
    known = np.square(means[0] - means[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(one, other) == pytest.approx(known, rel=1e-12)
    # Those that do not, against scipy's root of the product.
    mix = rng.normal(size=(6, 6))
    third = Statistics(means[1], mix @ mix.T)
    root = scipy.linalg.sqrtm(one.covariance @ third.covariance).real
    known = np.square(means[0] - means[1]).sum() + np.trace(
        one.covariance + third.covariance - 2 * root
    )
    assert frechet_distance(one, third) == pytest.approx(known, rel=1e-9)
    few = statistics(rng.normal(size=(4, 6)))  # a covariance of rank 3
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_its_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), 0.5 + rng.normal(size=(7, 5))
    kernel = lambda x, y: (x @ y / 5 + 1) ** 3
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    within = sum(np.mean([kernel(x[i], x[j]) for i, j in pairs]) for x in (a, b))
    between = np.mean([kernel(x, y) for x in a for y in b])
    # Subsets as large as the sets are the sets.
    found, deviation = kernel_distance(a, b, subsets=3)
    assert found == pytest.approx(within - 2 * between, rel=1e-9) and deviation < 1e-9
    many = rng.normal(size=(4000, 5))
    found, deviation = kernel_distance(many[:2000], many[2000:], subsets=20, size=500)
    assert abs(found) < deviation  # of one distribution
    assert kernel_distance(many[:2000], many[2000:] + 1.0, subsets=20, size=500)[0] > 1


@pytest.mark.slow
def test_the_command_scores_folders(inception_file, clip_folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    folders = {name: tmp_path / name for name in ("drawn", "others")}
    for folder in folders.values():
        (folder / "more").mkdir(parents=True)
        for n in range(2):
            pixels = rng.integers(0, 256, (20, 20 + n), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / ("more" if n else ".") / f"{n}.png")
    lines = [{"image": "0.png", "caption": "a"}, {"image": "more/1.png", "caption": "b"}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(i) + "\n" for i in lines))
    command = ["evaluate", "generation", "--images", str(folders["drawn"]), "--rows", "2"]
    distances = ["--reference", str(folders["others"]), "--inception", str(inception_file)]
    words = ["--clip", str(clip_folder), "--captions", str(tmp_path / "captions.jsonl")]
    main([*command, "--out", str(tmp_path / "out"), *distances, *words])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    features = {}
    for name, folder in folders.items():
        paths = [folder / "0.png", folder / "more/1.png"]
        pictures = [np.asarray(Image.open(path))[..., None] for path in paths]
        features[name] = inception_features(load_inception(inception_file), pictures, rows=2)
    expected = frechet_distance(*(statistics(f) for f in features.values()))
    assert summary["fid"] == pytest.approx(expected, rel=1e-4)
    expected, _ = kernel_distance(*features.values())
    assert summary["kid"] == pytest.approx(expected, rel=1e-3)
    rows = [json.loads(line) for line in open(tmp_path / "out" / "examples.jsonl")]
    assert [row["image"] for row in rows] == ["0.png", "more/1.png"]
    assert summary["clip_score"] == pytest.approx(np.mean([row["clip_score"] for row in rows]))
    assert "fid" in capsys.readouterr().out
    # Statistics in place of a folder.
    known = statistics(features["others"])
    np.savez(tmp_path / "known.npz", mu=known.mean, sigma=known.covariance)
    distances[1] = str(tmp_path / "known.npz")
    main([*command, "--out", str(tmp_path / "again"), *distances])
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["fid"] == pytest.approx(summary["fid"], rel=1e-4) and "kid" not in again


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to score"),
        (["--images", "nowhere"], "nothing to measure"),
        (["--images", "nowhere", "--reference", "there"], "need --inception"),
        (["--images", "nowhere", "--inception", "w.pth"], "--inception is used with --reference"),
        (["--images", "nowhere", "--captions", "no.jsonl"], "--captions is used with --clip"),
        (["--images", "nowhere", "--clip", "there", "--captions", "no.jsonl"], "cannot read no"),
        (["--images", "nowhere", "--clip", "there"], "no captions; give --captions FILE"),
        (["--geneval", "no.jsonl"], "cannot read no.jsonl"),
    ],
)
def test_bad_commands_say_so(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "generation", "--out", "out", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_file_of_statistics_is_named(tmp_path):
    path = tmp_path / "known.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    assert read_statistics(path, 3).covariance.shape == (3, 3)
    with pytest.raises(UserError, match="expected .4,. and .4, 4"):
        read_statistics(path, 4)
    whole = path.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for data in (whole[: len(whole) // 2], array.getvalue(), b"mu"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="known.npz holds no statistics"):
            read_statistics(path, 3)


def test_lines_end_where_json_lines_end(tmp_path):
    """Other line breaks of Unicode's may stand in a text as they are."""
    (tmp_path / "a.png").write_bytes(b"")
    line = json.dumps({"image": "a.png", "caption": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "captions.jsonl").write_text(line + "\r\n", encoding="utf-8")
    found = captioned(tmp_path, tmp_path / "captions.jsonl")
    assert found == [("a.png", "one\u2028two\x85three")]


@pytest.mark.parametrize(
    "text", ["[1]", '"a"', "null", "{}", '{"prompt": 3}', '{"prompt": "a"}\n{"prompt": "b"}', ""]
)
def test_what_stands_beside_pictures_is_one_object_with_a_prompt(tmp_path, text):
    samples = tmp_path / "00000" / "samples"
    samples.mkdir(parents=True)
    (samples / "0.png").write_bytes(b"")
    path = tmp_path / "00000" / "metadata.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="metadata.jsonl: expected one object with a prompt"):
        captioned(tmp_path, None)
    path.write_text('{"prompt": "a three", "tag": "counting"}\n')
    assert captioned(tmp_path, None) == [("00000/samples/0.png", "a three")]


def test_geneval_scores_are_means_of_tasks(tmp_path):
    path = tmp_path / "results.jsonl"
    lines = []
    for tag, right in (("counting", (1, 0, 0)), ("colors", (1,)), ("position", (0, 0))):
        for n, correct in enumerate(right):
            metadata = json.dumps({"tag": tag, "prompt": f"{tag} {n // 2}"})
            lines.append({"tag": tag, "correct": bool(correct), "metadata": metadata})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = geneval_summary(path)
    assert summary["overall"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert summary["correct_images"] == pytest.approx(2 / 6)
    # counting 0 (one of two right), counting 1, colors 0, position 0
    assert (summary["prompts"], summary["correct_prompts"]) == (4, 0.5)
    assert "task counting has 2 of 80 prompts" in summary["notes"]
    path.write_text('{"tag": "colors"}\n')
    with pytest.raises(UserError, match="results.jsonl:1: expected an object with tag"):
        geneval_summary(path)


def test_wise_scores_have_the_published_weights(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (1000, 3))
    names = ("consistency", "realism", "aesthetic_quality")
    lines = [
        {"prompt_id": n + 1, **dict(zip(names, map(int, row), strict=True))}
        for n, row in enumerate(scores)
    ]
    parts = [tmp_path / f"{n}.jsonl" for n in range(2)]
    for path, some in zip(parts, (lines[:400], lines[400:]), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in some))
    summary = wise_summary(parts)
    each = scores @ np.array([0.7, 0.2, 0.1]) / 2
    bounds = [0, 400, 567, 700, 800, 900, 1000]
    means = [each[a:b].mean() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert list(summary["categories"].values()) == pytest.approx(means)
    assert summary["overall"] == pytest.approx(np.dot(means, [0.4, 0.167, 0.133, 0.1, 0.1, 0.1]))
    assert summary["equal_mean"] == pytest.approx(np.mean(means)) and summary["notes"] == []
    partial = wise_summary(parts[:1])
    assert "overall" not in partial and "time has 0 of 167 prompts" in partial["notes"]
    assert summary["edition"] == "original"
    with pytest.raises(UserError, match="prompt_id 1 is there twice"):
        wise_summary([parts[0], parts[0]])
    failed = tmp_path / "failed.jsonl"
    failed.write_text(json.dumps(lines[0] | {"realism": 999}) + "\n")
    with pytest.raises(UserError, match="failed.jsonl:1: a score is not in 0 to 2.*judge that"):
        wise_summary([failed])


def test_wise_verified_has_other_categories_and_weights(tmp_path):
    right = np.random.default_rng(0).integers(0, 2, 1000)
    path = tmp_path / "scores.jsonl"
    lines = [json.dumps({"prompt_id": n + 1, "score": int(v)}) + "\n" for n, v in enumerate(right)]
    path.write_text("".join(lines))
    summary = wise_summary([path])
    means = [
        right[a:b].mean() for a, b in ((0, 400), *((s, s + 120) for s in range(400, 1000, 120)))
    ]
    assert summary["edition"] == "verified" and summary["notes"] == []
    assert list(summary["categories"].values()) == pytest.approx(means)
    # Shares of the prompts: the overall score is the share of right ones.
    assert summary["overall"] == pytest.approx(right.mean())
    # The first row of the published table.
    published = [0.8975, 0.8167, 0.9333, 0.8167, 0.8667, 0.8750]
    first = 1
    with path.open("w") as file:
        for share, count in zip(published, [400, *[120] * 5], strict=True):
            for n in range(count):
                line = {"prompt_id": first + n, "score": int(n < round(share * count))}
                file.write(json.dumps(line) + "\n")
            first += count
    summary = wise_summary([path])
    assert [round(share, 4) for share in summary["categories"].values()] == published
    assert summary["overall"] == pytest.approx(0.8760)
    path.write_text(lines[0] + json.dumps({"prompt_id": 2, "consistency": 1}) + "\n")
    with pytest.raises(UserError, match="scores.jsonl:2: of another edition"):
        wise_summary([path])
