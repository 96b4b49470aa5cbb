"""Configuration files with `${…}` references, read without OmegaConf.

The public configurations of the VideoSAUR family need eight functions and plain references. OmegaConf would keep these
functions in a registry of the whole process, under names such as `eval` that another program may have taken, and would
let a file reach more than that. Here a file can name its own values and these functions, and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.arithmetic import evaluate
from ssync_pl.tools.official.vits import vit_property

__all__ = ["apply_changes", "parse_yaml", "read_config", "resolve"]

_MOST_BYTES = 1_000_000
_MOST_NODES = 100_000
_DEEPEST = 50
_ARGUMENTS = "abcdefghijk"


def read_config(path: str | Path, changes: Iterable[str] = ()) -> dict[str, Any]:
    """Read a file and replace every reference by its value.

    Args:
        path: YAML file.
        changes: `KEY=VALUE` with dotted keys, put in before references are followed, as the official command line does.

    Returns:
        Plain dicts, lists and scalars.

    Raises:
        ConfigError: There is no such file, it is no YAML mapping, is too large, or a reference cannot be followed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(prefix="ssync-doctest-")) / "a.yaml"
        >>> _ = file.write_text("globals: {GPUS: 2}\\nbatch: '${mul: ${globals.GPUS}, 64}'")
        >>> read_config(file, ["globals.GPUS=4"])["batch"]
        256
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"Expected a configuration at {str(path)!r}, but there is no such file. Correct the path.")
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"Expected a configuration of at most {_MOST_BYTES} bytes, but {path} has more.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"Expected {path} to be YAML in UTF-8, but it is not ({error}). Correct it.") from error
    tree = parse_yaml(text, str(path))
    apply_changes(tree, changes)
    return resolve(tree)


def parse_yaml(text: str, source: str = "the text") -> dict[str, Any]:
    """Parse YAML as OmegaConf does: `1e-4` is a number, and no key may come twice.

    Args:
        text: The text.
        source: Its name, for messages.

    Returns:
        The mapping, references untouched.

    Raises:
        ConfigError: It is no YAML mapping.

    Example:
        >>> parse_yaml("lr: 1e-4")
        {'lr': 0.0001}
    """
    try:
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Expected {source} to be YAML, but it is not ({reason}). Correct it.") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"Expected {source} to be a YAML mapping, but got {type(tree).__name__}.")
    return tree


def apply_changes(tree: dict[str, Any], changes: Iterable[str]) -> None:
    """Put values into a configuration.

    Args:
        tree: The configuration; changed in place.
        changes: `KEY=VALUE` with dotted keys; missing mappings on the way are made.

    Raises:
        ConfigError: A change has no `=`, or leads through a value that is no mapping.

    Example:
        >>> tree = {"trainer": {"max_steps": 5}}
        >>> apply_changes(tree, ["trainer.max_steps=7", "seed=1"])
        >>> tree
        {'trainer': {'max_steps': 7}, 'seed': 1}
    """
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign or not key:
            raise ConfigError(
                f"Expected a change KEY=VALUE, but got {change!r}. Write for example trainer.max_steps=7."
            )
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            if not isinstance(node[parent], dict):
                raise ConfigError(f"Expected {key!r} to lead through mappings, but {parent!r} is none. Correct it.")
            node = node[parent]
        node[last] = parse_yaml(f"value: {value}", repr(change))["value"]


def resolve(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `${path}`, `${.path}` and `${function: arguments}` by their values.

    Functions: `add`, `sub`, `mul`, `div`, `min`, `max`; `eval`, arithmetic only; `config_prop: VIT_PARAMS, name,
    FEAT_DIM`, facts about vision transformers.

    Args:
        tree: The configuration.

    Returns:
        A copy with values in place of references.

    Raises:
        ConfigError: A reference leads nowhere or in a circle, or a function is unknown or refuses its arguments.

    Example:
        >>> resolve({"a": 2, "b": {"c": "${add: ${a}, ${.d}}", "d": 0.5}, "e": "run_${b.c}"})
        {'a': 2, 'b': {'c': 2.5, 'd': 0.5}, 'e': 'run_2.5'}
    """
    value = _Resolver(tree).node((), ())
    return dict(value)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats, refusing repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *defaults`, which the safe loader flattens
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        repeated = [key for number, key in enumerate(keys) if key in keys[:number]]
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+0123456789."),
)


class _Resolver:
    """Walks a configuration; paths are tuples of keys from the root."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        self.visited = 0

    def node(self, path: tuple[Any, ...], stack: tuple[tuple[Any, ...], ...]) -> Any:
        self.visited += 1
        # Aliases of YAML can stand for far more nodes than the file has.
        if self.visited > _MOST_NODES or len(stack) > _DEEPEST or len(path) > _DEEPEST:
            raise ConfigError("Expected a configuration of ordinary size, but its references lead too far. Correct it.")
        if path in stack:
            raise ConfigError(f"Expected {_dotted(path)} to have a value, but it refers to itself. Correct it.")
        value = self._walk(path, stack)
        if isinstance(value, dict):
            return {key: self.node((*path, key), stack) for key in value}
        if isinstance(value, list):
            return [self.node((*path, number), stack) for number in range(len(value))]
        if isinstance(value, str) and "${" in value:
            return self._text(value, path, (*stack, path))
        return value

    def _walk(self, path: tuple[Any, ...], stack: tuple[tuple[Any, ...], ...]) -> Any:
        value: Any = self.root
        for depth, key in enumerate(path):
            if isinstance(value, str) and "${" in value:
                value = self._text(value, path[:depth], (*stack, path[:depth]))
            if isinstance(value, list) and str(key).isdigit() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise ConfigError(f"Expected a value at {_dotted(path)}, but there is none. Name one that exists.")
        return value

    def _text(self, text: str, path: tuple[Any, ...], stack: tuple[tuple[Any, ...], ...]) -> Any:
        parts: list[Any] = []
        position = 0
        while (start := text.find("${", position)) >= 0:
            if start > position:
                parts.append(text[position:start])
            value, position = self._reference(text, start + 2, path, stack)
            parts.append(value)
        if position < len(text):
            parts.append(text[position:])
        if len(parts) == 1:
            return parts[0]
        if any(isinstance(part, (dict, list)) for part in parts):
            raise ConfigError(f"Expected single values inside {text!r} at {_dotted(path)}, but got a list or mapping.")
        return "".join("null" if part is None else str(part) for part in parts)

    def _reference(
        self, text: str, position: int, path: tuple[Any, ...], stack: tuple[tuple[Any, ...], ...]
    ) -> tuple[Any, int]:
        """Value of what follows `${`, and the position behind its `}`."""
        if len(stack) > _DEEPEST:
            raise ConfigError("Expected a configuration of ordinary size, but its references lead too far. Correct it.")
        found = re.compile(r"\s*([\w.\[\]-]+)\s*([:}])").match(text, position)
        if found is None:
            raise _malformed(text, path)
        name, position = found.group(1), found.end()
        if found.group(2) == "}":
            return self.node(_absolute(name, path), stack), position
        arguments: list[Any] = []
        while True:
            value, position = self._argument(text, position, path, (*stack, ("${", position)))
            arguments.append(value)
            position += 1
            if text[position - 1] == "}":
                return _call(name, arguments, path), position

    def _argument(
        self, text: str, position: int, path: tuple[Any, ...], stack: tuple[tuple[Any, ...], ...]
    ) -> tuple[Any, int]:
        """Value of an argument, and the position of the `,` or `}` behind it."""
        position += len(text[position:]) - len(text[position:].lstrip())
        quoted = re.compile(r"'([^'\\]*)'|\"([^\"\\]*)\"").match(text, position)
        value: Any
        if quoted:
            value, position = quoted.group(1) if quoted.group(2) is None else quoted.group(2), quoted.end()
        elif text.startswith("${", position):
            value, position = self._reference(text, position + 2, path, stack)
        else:
            bare = re.compile(r"[^,}{$'\"\[\]\\]*").match(text, position)
            value, position = _scalar(bare.group() if bare else ""), bare.end() if bare else position
        rest = text[position:].lstrip()
        if not rest or rest[0] not in ",}":
            raise _malformed(text, path)
        return value, len(text) - len(rest)


def _absolute(name: str, path: tuple[Any, ...]) -> tuple[Any, ...]:
    name = re.sub(r"\[([\w-]+)\]", r".\1", name)
    keys = name.lstrip(".")
    dots = len(name) - len(keys)
    # One dot is the mapping that holds the value, each further one its parent.
    start = path[: max(0, len(path) - dots)] if dots else ()
    return (*start, *keys.split("."))


def _call(name: str, arguments: list[Any], path: tuple[Any, ...]) -> Any:
    if name not in _FUNCTIONS:
        known = ", ".join(sorted(_FUNCTIONS))
        raise ConfigError(
            f"Expected one of the functions {known} at {_dotted(path)}, but got {name!r}. Write the value."
        )
    try:
        return _FUNCTIONS[name](*arguments)
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(
            f"Expected {name!r} at {_dotted(path)} to take numbers, but got {arguments} ({error}). Correct it."
        ) from error


def _evaluated(text: str, *values: Any) -> Any:
    names, colon, body = str(text).partition(":")
    if not colon:
        names, body = ",".join(_ARGUMENTS[: len(values)]), str(text)
    found = [name.strip() for name in names.removeprefix("lambda ").split(",") if name.strip()]
    if len(found) != len(values):
        raise TypeError(f"{len(values)} values for the names {found}")
    return evaluate(body, dict(zip(found, values, strict=True)))


def _numbers(values: Iterable[Any]) -> list[Any]:
    values = list(values)
    if not values or not all(type(value) in (int, float) for value in values):
        raise TypeError("numbers only")
    return values


def _product(*values: Any) -> Any:
    # Python's own `math.prod` keeps ints, but only after the values are known to be numbers of ordinary size.
    result: Any = 1
    for value in _numbers(values):
        result = evaluate("a * b", {"a": result, "b": value})
    return result


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eval": _evaluated,
    "add": lambda *values: sum(_numbers(values)),
    "sub": lambda a, b: _numbers([a, b])[0] - b,
    "mul": _product,
    "div": lambda a, b: _numbers([a, b])[0] / b,
    "min": lambda *values: min(_numbers(values)),
    "max": lambda *values: max(_numbers(values)),
    "config_prop": vit_property,
}


def _scalar(text: str) -> Any:
    text = text.strip()
    value = yaml.load(text, Loader=_Loader) if text else None
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"Expected a finite number, but got {text!r}. Correct it.")
    return value if isinstance(value, (int, float, str, type(None))) else text


def _malformed(text: str, path: tuple[Any, ...]) -> ConfigError:
    return ConfigError(
        f"Expected a reference such as ${{globals.SLOTS}} or ${{mul: ${{.A}}, 2}} at {_dotted(path)}, but got "
        f"{text!r}. Write the value."
    )


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(key) for key in path) or "the root"
