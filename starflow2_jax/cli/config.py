"""Config files: Python with `get_config()`, and overrides from the command line."""

import ast
import difflib
import importlib.util
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from starflow2_jax.errors import UserError
from starflow2_jax.provenance import differing_keys, to_json

__all__ = ["differing_keys", "load_config", "split_overrides", "to_json"]

_PREFIX = "--config."
_BOOLS = {"true": True, "false": False, "1": True, "0": False}


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of a command line.

    Returns:
        What is left; the overrides as (key without `config.`, text of the value). Both in order.

    Raises:
        UserError: an override without a value.
    """
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        if not word.startswith(_PREFIX):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix(_PREFIX).partition("=")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise UserError(f"{_PREFIX}{key} needs a value: {_PREFIX}{key}=VALUE")
            value = following
        overrides.append((key, value))
    return rest, overrides


def _load_module(path: pathlib.Path) -> types.ModuleType:
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    # Registered under a name of its own: dataclasses and pickle look a module up by name, and the
    # file's own name ("digits") may be taken by a package.
    name = f"starflow2_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file (NAME.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _call(path, spec.loader.exec_module, module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _call(path: pathlib.Path, function: Any, *args: Any) -> Any:
    """Runs code of the config file; what it raises becomes a UserError with the file's line."""
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line = error.lineno
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        where = f"{path}, line {line}" if line else str(path)
        message = " ".join(str(error).split())
        raise UserError(f"config file {where} raises {type(error).__name__}: {message}") from error


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    for name in config:
        value = config[name]
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _mismatch(key: str, current: Any, expected: str, text: str) -> UserError:
    return UserError(f"config.{key} is {expected} (now {current!r}); got {text!r}")


def _parse_scalar(kind: type, text: str) -> Any:
    """Raises ValueError where `text` is no `kind`."""
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text.lower()]
    return kind(text)


def _parse_sequence(key: str, current: Any, kind: type, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # Words without quotes: a,b or (a,b).
        value = [word.strip() for word in text.strip("()[] ").split(",") if word.strip()]
    items = list(value) if isinstance(value, tuple | list) else [value]
    kinds = {type(item) for item in current or ()}
    if len(kinds) == 1:
        (element,) = kinds
        if element is float:
            items = [float(i) if type(i) is int else i for i in items]
        if any(type(item) is not element for item in items):
            raise _mismatch(key, current, f"a {kind.__name__} of {element.__name__}", text)
    return kind(items)


def _parse(key: str, current: Any, kind: type, text: str) -> Any:
    if text == "None":
        return None
    if kind is type(None):
        # Nothing says what the entry is meant to hold: a literal if it reads as one, else words.
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
    if kind in (tuple, list):
        return _parse_sequence(key, current, kind, text)
    names = {bool: "a bool (True or False)", int: "an int", float: "a float", str: "a str"}
    if kind not in names:
        raise UserError(
            f"config.{key} is of type {kind.__name__}, which the command line cannot set; "
            "change it in the config file"
        )
    try:
        return _parse_scalar(kind, text)
    except ValueError as error:
        raise _mismatch(key, current, names[kind], text) from error


def _apply(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    *path, last = key.split(".")
    node: Any = config
    for name in path:
        node = node[name] if isinstance(node, ml_collections.ConfigDict) and name in node else None
    if not isinstance(node, ml_collections.ConfigDict) or last not in node:
        names = list(_keys(config))
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
        hint = f"did you mean config.{near[0]}?" if near else "the config is empty"
        raise UserError(f"config.{key} does not exist; {hint}")
    current = node[last]
    if isinstance(current, ml_collections.ConfigDict):
        inside = ", ".join(f"config.{key}.{name}" for name in _keys(current)) or "nothing"
        raise UserError(f"config.{key} is a group; set one of its entries ({inside})")
    # A placeholder is None and yet knows its type.
    node[last] = _parse(key, current, node.get_type(last), text)


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[tuple[str, str]] = (),
    offered: Sequence[tuple[str, str]] = (),
) -> tuple[ml_collections.ConfigDict, types.ModuleType]:
    """Loads a config file, applies overrides, and locks the config.

    The file defines `get_config() -> ConfigDict`. If it has an entry `smoke` that the overrides set
    to True, the file's `smoke(config)` is called before the other overrides are applied, to change
    the config in place to tiny sizes on made data; so explicit overrides win over it. An entry
    `topology` that is set calls the file's `for_topology(config)` at the same time: settings that
    suit those accelerators. Where the file has none (a UserError of that function), an offered
    topology gets a note on stderr.

    Args:
        path: of the Python file.
        overrides: (key without `config.`, text), as `split_overrides` gives them. The text is read
            as the type of the entry it replaces: bool, int, float, str, tuple or list; `None` is
            None for all of them; an entry that is None takes any Python literal.
        offered: of the same form; those of entries that the config does not have are left out.

    Returns:
        The locked config, and the file's module with whatever else it defines.

    Raises:
        UserError: the file is missing, raises, or has no `get_config`; a key does not exist (the
            nearest one is named); a value has the wrong type.
    """
    path = pathlib.Path(path).expanduser().absolute()
    module = _load_module(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"config file {path} defines no function get_config()")
    config = _call(path, module.get_config)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"get_config() of {path} returns a {type(config).__name__}, not an "
            "ml_collections.ConfigDict"
        )
    overrides = [*(pair for pair in offered if pair[0] in config), *overrides]
    early = ("smoke", "topology", "slices")
    for key, text in overrides:
        if key in early:
            _apply(config, key, text)
    if config.get("topology"):
        with config.unlocked():
            try:
                _call(path, module.for_topology, config)
            except UserError as error:
                if not any(key == "topology" for key, _ in offered):
                    raise
                print(f"starflow2: note: {error}; as the config stands", file=sys.stderr)
    if config.get("smoke"):
        if not callable(getattr(module, "smoke", None)):
            raise UserError(f"config file {path} has no smoke mode: it defines no smoke(config)")
        with config.unlocked():
            _call(path, module.smoke, config)
        config.smoke = True
    for key, text in overrides:
        if key not in early:
            _apply(config, key, text)
    config.lock()
    to_json(config)  # a value that cannot be recorded is an error now, not after an hour
    return config, module
