import argparse
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import pytest

import starflow2_jax
from starflow2_jax import provenance
from starflow2_jax.cli import main as cli
from starflow2_jax.cli.config import load_config, split_overrides
from starflow2_jax.errors import Interrupted, UserError

CONFIG = """
import ml_collections
from ml_collections import config_dict


def get_config():
    config = ml_collections.ConfigDict()
    config.smoke = False
    config.seed = 0
    config.name = "pets"
    config.vlm_path = None
    config.limit = config_dict.placeholder(int)
    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000
    config.train.learning_rate = 1e-3
    config.train.use_ema = True
    config.train.betas = (0.9, 0.95)
    config.train.stages = ("t2i", "joint")
    config.train.sizes = [1, 2]
    config.train.warmup = config.train.get_ref("steps") // 10
    return config


def smoke(config):
    config.train.steps = 2
    config.train.sizes = [8]
    config.made_data = True
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "pets.py"
    path.write_text(CONFIG)
    return path


def load(path, *words):
    rest, overrides = split_overrides(words)
    assert rest == []
    return load_config(path, overrides)[0]


def test_config_is_loaded_and_locked(config_file):
    config, module = load_config(config_file)
    assert config.train.steps == 1000 and module.smoke
    with pytest.raises(AttributeError):
        config.trian = 1


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.steps", "20", 20),
        ("train.learning_rate", "2", 2.0),
        ("train.learning_rate", "3e-4", 3e-4),
        ("train.use_ema", "False", False),
        ("train.use_ema", "true", True),
        ("name", "a=b, c", "a=b, c"),
        ("name", "7", "7"),
        ("name", "None", None),
        ("train.betas", "(0.8, 1)", (0.8, 1.0)),
        ("train.stages", "joint", ("joint",)),
        ("train.stages", "a,b", ("a", "b")),
        ("train.stages", "('a', 'b')", ("a", "b")),
        ("train.sizes", "3,4,5", [3, 4, 5]),
        ("train.sizes", "[]", []),
        ("vlm_path", "weights/qwen", "weights/qwen"),
        ("vlm_path", "None", None),
        ("vlm_path", "3", 3),
        ("limit", "-3", -3),
        ("train.warmup", "5", 5),
    ],
)
def test_overrides(config_file, key, text, value):
    for words in ([f"--config.{key}={text}"], [f"--config.{key}", text]):
        node = load(config_file, *words)
        for name in key.split("."):
            node = node[name]
        assert node == value and type(node) is type(value)


def test_references_follow_overrides(config_file):
    assert load(config_file, "--config.train.steps=50").train.warmup == 5


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.steps", "1e3", "config.train.steps is an int (now 1000); got '1e3'"),
        ("train.learning_rate", "fast", "is a float (now 0.001); got 'fast'"),
        ("train.use_ema", "maybe", "is a bool (True or False) (now True); got 'maybe'"),
        ("train.betas", "(a, 1)", "config.train.betas is a tuple of float (now (0.9, 0.95)); got"),
        ("train.sizes", "1.5,2", "config.train.sizes is a list of int (now [1, 2]); got '1.5,2'"),
        ("limit", "many", "config.limit is an int (now None); got 'many'"),
        (
            "train",
            "3",
            "config.train is a group; set one of its entries (config.train.betas, config",
        ),
    ],
)
def test_a_value_of_the_wrong_type(config_file, key, text, message):
    with pytest.raises(UserError) as error:
        load(config_file, f"--config.{key}={text}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.setps", "train.steps"),
        ("trian.learning_rate", "train.learning_rate"),
        ("steps", "train.steps"),
        ("lerning_rate", "train.learning_rate"),
        ("train.steps.more", "train.steps"),
        ("sed", "seed"),
    ],
)
def test_a_misspelt_key_names_the_nearest(config_file, key, nearest):
    with pytest.raises(UserError) as error:
        load(config_file, f"--config.{key}=3")
    assert str(error.value) == f"config.{key} does not exist; did you mean config.{nearest}?"


def test_an_override_needs_a_value(config_file):
    for words in (["--config.seed"], ["--config.seed", "--config.name=a"]):
        with pytest.raises(UserError, match=r"--config\.seed needs a value"):
            load(config_file, *words)


def test_explicit_overrides_win_over_smoke(config_file):
    config = load(config_file, "--config.train.steps=7", "--config.smoke=True")
    assert config.smoke and config.made_data
    assert config.train.steps == 7 and config.train.sizes == [8]
    assert "made_data" not in load(config_file)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "does not exist"),
        ("x = 1\n", "defines no function get_config()"),
        ("def get_config():\n    return {}\n", "returns a dict, not an ml_collections.ConfigDict"),
        ("import math\nmath.sqrt(-1)\n", "bad.py, line 2 raises ValueError: math domain error"),
        ("def get_config():\n\n    return 1 / 0\n", "bad.py, line 3 raises ZeroDivisionError"),
        ("def f(:\n", "bad.py, line 1 raises SyntaxError"),
        (
            CONFIG.replace('"pets"', "print"),
            "config.name is <built-in function print> of type builtin_function_or_method",
        ),
        (CONFIG.replace("def smoke", "def other"), "has no smoke mode"),
    ],
)
def test_bad_config_files(tmp_path, source, message):
    path = tmp_path / "bad.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError) as error:
        load_config(path, [("smoke", "True")] if "def other" in (source or "") else [])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_to_json_and_differing_keys(config_file):
    first, second = (
        load(config_file),
        load(config_file, "--config.train.steps=20", "--config.seed=1"),
    )
    old = json.loads(json.dumps(provenance.to_json(first)))
    assert old["train"]["betas"] == [0.9, 0.95] and old["vlm_path"] is None
    assert provenance.differing_keys(old, provenance.to_json(first)) == {}
    assert provenance.differing_keys(old, provenance.to_json(second)) == {
        "config.seed": (0, 1),
        "config.train.steps": (1000, 20),
        "config.train.warmup": (100, 2),
    }
    assert provenance.differing_keys({"a": {"b": 1}}, {"a": {}}) == {
        "config.a": (provenance.ABSENT, {}),
        "config.a.b": (1, provenance.ABSENT),
    }


def test_workdir_belongs_to_one_config(config_file, tmp_path):
    config = load(config_file)
    workdir = provenance.claim_workdir(tmp_path / "runs" / "a", config)
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"] == provenance.to_json(config)
    assert record["package_version"] == starflow2_jax.__version__
    assert record["format_version"] == provenance.WORKDIR_FORMAT_VERSION
    assert "git_revision" in record
    assert provenance.claim_workdir(workdir, config) == workdir
    with pytest.raises(UserError) as error:
        provenance.claim_workdir(workdir, load(config_file, "--config.seed=3"))
    assert "differing keys: config.seed (0 there, 3 now); use another workdir" in str(error.value)
    assert json.loads((workdir / "config.json").read_text()) == record
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


SEVEN = pathlib.Path(__file__).parent.parent / "configs" / "starflow2_7b.py"


def seven(*overrides):
    return load_config(SEVEN, [tuple(word.split("=")) for word in overrides])[0]


def test_a_run_moves_to_another_topology(tmp_path):
    workdir = provenance.claim_workdir(tmp_path, seven("topology=v5p:4x4x4"))
    for overrides in (
        ["topology=v6e:16x16", "remat=full", "stages.joint.optimizer.accumulate=8"],
        ["topology=v5e:16x16", "slices=2"],
        ["mesh.tensor=2"],
    ):
        assert provenance.claim_workdir(workdir, seven(*overrides)) == workdir
    for key in ("stages.joint.optimizer.steps", "stages.joint.batch.rows", "flow.deep_layers"):
        with pytest.raises(UserError, match=f"differing keys: config.{key}"):
            provenance.claim_workdir(workdir, seven(f"{key}=32"))


@pytest.mark.parametrize("name", ["starflow2_7b.py", "starflow2_3b.py"])
def test_a_misspelt_topology(name, capsys):
    path = SEVEN.with_name(name)
    with pytest.raises(UserError, match=r"no settings for v5p:4x4x5, only for .*:\d+x\d+"):
        load_config(path, [("topology", "v5p:4x4x5")])
    with pytest.raises(UserError, match=r"no settings for 4xv5e:16x16"):
        load_config(path, [("topology", "v5e:16x16"), ("slices", "4")])
    # What is to be planned need not be known.
    config, _ = load_config(path, [], [("topology", "v5p:8x8x8")])
    assert config.mesh.fsdp == -1 and "no settings for v5p:8x8x8" in capsys.readouterr().err


def test_folders_that_were_made_for_nothing_go(config_file, tmp_path):
    for place, left in (("runs/a", []), ("there/b", ["there"])):
        (tmp_path / "there").mkdir(exist_ok=True)
        made = provenance.missing_folders(tmp_path / place)
        workdir = provenance.claim_workdir(tmp_path / place, load(config_file))
        provenance.release_workdir(workdir, made)
        assert [p.name for p in tmp_path.iterdir() if p.is_dir() and p.name in place] == left
        assert not (tmp_path / place).exists()
    workdir = provenance.claim_workdir(tmp_path / "there", load(config_file))
    provenance.release_workdir(workdir, provenance.missing_folders(workdir))
    assert workdir.is_dir() and not list(workdir.iterdir())
    workdir = provenance.claim_workdir(tmp_path / "run", load(config_file))
    (workdir / "metrics.jsonl").touch()
    provenance.release_workdir(workdir, [workdir])
    assert (workdir / "config.json").is_file()


def test_workdir_of_another_version_or_kind(config_file, tmp_path):
    config = load(config_file)
    record = {"format_version": 99, "package_version": "9.0", "config": {}}
    for content, message in (
        (json.dumps(record).encode(), "format version 99"),
        (b"{", "not the record"),
        (b"\xff", "not the record"),
        (b'{"format_version": 1, "config": 5}', "not the record"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        for use in (provenance.claim_workdir, provenance.check_workdir):
            with pytest.raises(UserError, match=message):
                use(tmp_path, config)
    with pytest.raises(UserError, match="remote address"):
        provenance.claim_workdir("gs://bucket/run", config)
    with pytest.raises(UserError, match="cannot use workdir"):
        provenance.claim_workdir(config_file, config)


def test_git_revision(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    package = tmp_path / "starflow2_jax" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(starflow2_jax, "__file__", str(package))
    assert provenance.git_revision() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = provenance.git_revision()
    assert len(clean) == 40
    package.write_text("a = 1\n")
    assert provenance.git_revision() == f"{clean}-dirty"
    # Installed inside somebody else's repository.
    inner = tmp_path / "site-packages" / "starflow2_jax" / "__init__.py"
    inner.parent.mkdir(parents=True)
    monkeypatch.setattr(starflow2_jax, "__file__", str(inner))
    assert provenance.git_revision() is None


@pytest.fixture
def loop(monkeypatch):
    """A stand-in for the training loop; `calls` holds what it was given."""
    module = types.ModuleType("starflow2_jax.training.loop")
    module.calls = []
    module.run = lambda *args: module.calls.append(args)
    import starflow2_jax.training

    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(starflow2_jax.training, "loop", module, raising=False)
    return module


def test_train_runs_the_loop_then_the_report(config_file, tmp_path, loop):
    source = "\n\ndef report(config, workdir):\n    (workdir / 'report').write_text(config.name)\n"
    config_file.write_text(CONFIG + source)
    workdir = tmp_path / "run"
    argv = ["train", "--config.name", "cats", "--config", str(config_file), "--workdir"]
    assert cli.main([*argv, str(workdir), "--config.seed=4"]) == 0
    ((config, module, given, peak_flops),) = loop.calls
    assert (config.name, config.seed, given, peak_flops) == ("cats", 4, workdir, None)
    assert config.is_locked and module.get_config
    assert (workdir / "report").read_text() == "cats"


def test_errors_are_one_line(config_file, tmp_path, loop, capsys, monkeypatch):
    argv = ["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main([*argv, "--config.sed=1"]) == 2
    line = "starflow2: error: config.sed does not exist; did you mean config.seed?\n"
    assert capsys.readouterr().err == line
    assert loop.calls == [] and not (tmp_path / "run").exists()
    monkeypatch.setenv("STARFLOW2_TRACEBACK", "1")
    assert cli.main([*argv, "--config.sed=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith(line)


def test_interruptions(config_file, tmp_path, loop, capsys):
    argv = ["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    for raised, line in (
        (
            Interrupted("joint", 120),
            "interrupted at stage joint step 120; saved; run the same command to continue",
        ),
        (KeyboardInterrupt(), "interrupted"),
    ):

        def run(*_, raised=raised):
            raise raised

        loop.run = run
        assert cli.main(argv) == 130
        assert capsys.readouterr().err == f"starflow2: {line}\n"


def test_a_bug_keeps_its_traceback(config_file, tmp_path, loop):
    loop.run = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["paint"],
        ["train"],
        ["train", "--config", "a.py"],
        ["train", "--config", "a.py", "--workdir", "b", "--confg.a=1"],
        ["train", "--config", "a.py", "--work", "b"],
        ["--config.a=1"],
    ],
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_is_complete(capsys):
    parser = cli.build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert list(commands.choices) == list(cli.COMMANDS)
    for name, command in commands.choices.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert cli.COMMANDS[name].SUMMARY in parser.format_help()
        assert command.description.strip().splitlines()[0] in text
        for action in command._actions:
            assert action.help, f"{name}: no help for {action.option_strings or action.dest}"
            if action.help == argparse.SUPPRESS:  # between processes, not for people
                continue
            assert all(option in text for option in action.option_strings)
        if command.get_default("overrides") is not None:
            assert "--config.a.b=VALUE" in text and "--config.smoke=True" in text


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], *([c, "--help"] for c in cli.COMMANDS)]
)
def test_help_does_not_import_jax(argv):
    code = f"""
        import sys
        from starflow2_jax.cli.main import main
        try:
            main({argv!r})
        except SystemExit as stop:
            assert stop.code == 0
        heavy = {{"jax", "flax", "orbax", "torch", "transformers", "numpy"}} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "starflow2_jax", "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert (done.returncode, done.stdout.strip()) == (0, starflow2_jax.__version__)
