"""Reads public configurations: YAML whose `${…}` references OmegaConf resolves, within limits, running no code."""

import ast
import inspect
import itertools
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partialmethod
from pathlib import Path
from typing import Any

import yaml

from ssync_pl.errors import ConfigError, explained, require, require_packages

_MOST_BYTES = 200_000
_MOST_REFERENCES = 2_000  # OmegaConf takes about a millisecond for each
_MOST_CHARACTERS = 10_000
_DEEPEST = 20
_LARGEST = 1e18
_TOO_MUCH = (
    f"Expected values nested at most {_DEEPEST} deep, no aliases, and at most {_MOST_REFERENCES} references that stand "
    "for little, but some stand for more, or refer to themselves."
)
_NODES = (ast.Expr, ast.Name, ast.UnaryOp, ast.BinOp, ast.Constant)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.UAdd, ast.USub)  # % would format text of any length
_OURS = "ssync_pl."  # prefix of our functions in OmegaConf's registry, which the whole process shares
_NOTHING = object()
_VIT = re.compile(r"vit_(?P<size>small|base|large)_patch(?P<patch>\d+)(?:_(?P<pixels>\d+))?_\w+")
_WIDTHS = {"small": 384, "base": 768, "large": 1024}


class _TooMuchError(BaseException):
    """Ends the reading at once: OmegaConf goes on with the next value after an `Exception`."""


def read_config(path: str | Path, changes: Iterable[str] = ()) -> dict[str, Any]:
    """Reads a public configuration with its references followed, after the changes `KEY=VALUE`."""
    require_packages("official", "omegaconf")
    from omegaconf import OmegaConf

    path = Path(path)
    require(path.is_file(), f"a configuration at {str(path)!r}", "no such file", advice="Correct the path.")
    require(path.stat().st_size <= _MOST_BYTES, f"{path} to have at most {_MOST_BYTES} bytes", "more")
    # Since 2.4; before, `register_resolver` is the legacy one.
    new = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register: Any = OmegaConf.register_resolver if new else OmegaConf.register_new_resolver
    for name, function in {**_FUNCTIONS, "ref": _follower()}.items():
        register(_OURS + name, function, replace=True)
    try:
        tree = _parsed(path.read_text(encoding="utf-8-sig"))
        require(isinstance(tree, dict) and len(tree) > 0, "a YAML mapping", "none")
        config = OmegaConf.create(tree)
        for change in changes:
            key, _, value = change.partition("=")
            require("=" in change[1:], "a change KEY=VALUE such as trainer.max_steps=7", repr(change))
            OmegaConf.update(config, key, _parsed(f"value: {value}")["value"], merge=False)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        return plain
    except (Exception, _TooMuchError) as error:  # PyYAML lets many kinds escape, for example from `!!int abc`
        reason = str(error).partition("\n    full_key:")[0].rpartition("raised while resolving interpolation: ")[2]
        if isinstance(error, RecursionError) or "recursion depth" in reason:
            reason = _TOO_MUCH
        place = getattr(error, "full_key", None)
        where = f"{path}, {str(place)[:100]}" if place else str(path)
        raise ConfigError(f"In {where}: {' '.join(reason.split())[:500]}") from error


def _parsed(text: str) -> Any:
    """Parses YAML as OmegaConf does, its references led to the functions of this module; refuses aliases."""
    from omegaconf import OmegaConf

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
            raise _TooMuchError(_TOO_MUCH)
    return _ours(OmegaConf.to_container(OmegaConf.create(text)))


def _ours(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ours(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_ours(child) for child in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    ours = re.sub(r"\$\{\s*([\w.]+)\s*:", rf"${{{_OURS}\1:", value)
    ours = re.sub(r"\$\{\s*(\.*[\w\[][\w.\[\]-]*)\s*\}", rf"${{{_OURS}ref:'\1'}}", ours)
    known = ours.count("${") == ours.count(f"${{{_OURS}")
    require(known, "references such as ${globals.SLOTS} or ${mul: ${.A}, 2}", repr(value[:200]))
    return ours


def _follower() -> Callable[..., Any]:
    """Returns the function behind `${path}`, which follows a limited number of references."""
    from omegaconf import OmegaConf

    calls = itertools.count(1)

    def follow(key: str, *, _parent_: Any, _root_: Any) -> Any:
        value = OmegaConf.select(_parent_ if key.startswith(".") else _root_, key, default=_NOTHING)
        require(value is not _NOTHING, f"a value at {key}", "none", advice="Name one that exists.")
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if next(calls) > _MOST_REFERENCES or len(str(plain)) > _MOST_CHARACTERS:
            raise _TooMuchError(_TOO_MUCH)
        return plain

    return follow


def _number(value: Any) -> Any:
    known = type(value) in (int, float) and abs(value) <= _LARGEST
    require(known, f"a number of at most {_LARGEST:.0e}", str(value)[:50])
    return value


def evaluate(expression: Any, *values: Any) -> int | float:
    """Computes `+ - * /` of numbers, parentheses and the values by the names a, b, c …; refuses everything else."""
    import simpleeval

    names = dict(zip(string.ascii_lowercase, map(_number, values), strict=False))
    operators = {kind: simpleeval.DEFAULT_OPERATORS[kind] for kind in _OPERATORS}
    evaluator = simpleeval.SimpleEval(operators, functions={}, names=names)
    evaluator.nodes = {kind: handle for kind, handle in evaluator.nodes.items() if kind in _NODES}
    expected = f"arithmetic of numbers such as 'a / 32 * b' in {str(expression)[:200]!r}"
    kinds = (simpleeval.InvalidExpression, SyntaxError, ArithmeticError, ValueError, TypeError, RecursionError)
    with explained(expected, *kinds, advice="Correct it.", kind=ConfigError):
        return _number(evaluator.eval(str(expression)))


def _vit_property(table: str, name: str, key: str) -> int:
    """Returns the width or the number of patches of a vision transformer, by its name in old timm."""
    found = _VIT.fullmatch(str(name))
    if found is None or table != "VIT_PARAMS" or key not in ("FEAT_DIM", "NUM_PATCHES"):
        raise ConfigError(f"Expected FEAT_DIM or NUM_PATCHES of a vision transformer, but got {key!r} of {name!r}.")
    return _WIDTHS[found["size"]] if key == "FEAT_DIM" else (int(found["pixels"] or 224) // int(found["patch"])) ** 2


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *values: _number(sum(map(_number, values))),
    "mul": lambda *values: _number(math.prod(map(_number, values))),
    "eval": evaluate,
    "config_prop": _vit_property,
}


class Keys:
    """Takes values one by one; `refuse_unread` finds those that nothing took. A value of `null` is as good as none."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.values = dict(_leaves(tree, ""))
        self.left_out: dict[str, str] = {}
        self._read: set[str] = set()

    def below(self, section: str) -> list[str]:
        """Names of the entries of a section; none without it."""
        start = f"{section}."
        return list(dict.fromkeys(key[len(start) :].partition(".")[0] for key in self.values if key.startswith(start)))

    def take(self, key: str, default: Any = _NOTHING) -> Any:
        """Takes a value; a missing one is the default, or an error where there is none."""
        self._read.add(key)
        value = self.values.get(key, default)
        require(value is not _NOTHING, f"{key} to have a value", "none", advice="Add it.")
        return value

    def number(self, key: str, default: Any = _NOTHING, kind: type = float) -> Any:
        """Takes a finite number, a whole one where `kind` is `int`."""
        value = self.take(key, default)
        known = type(value) in (int, float) and math.isfinite(value) and value == kind(value)
        require(known or value is default, f"{key} to be a {'whole ' * (kind is int)}number", repr(value))
        return default if value is default else kind(value)

    integer = partialmethod(number, kind=int)

    def choose(self, key: str, *choices: Any, default: Any = _NOTHING) -> Any:
        """Takes a value of which the package has only some counterparts."""
        value = self.take(key, default)
        # `1 == True` in Python, but no configuration means that.
        known = any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)
        expected = (
            f"{key} to be {' or '.join(map(repr, choices))}, as this package has no other and sizes have to agree"
        )
        require(known, expected, repr(value), advice="Change it, or write the configuration by hand.")
        return value

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Takes all values whose keys match (`*` for any part), which are not translated, and notes the reasons."""
        for key in self.values:
            for pattern, reason in reasons.items():
                if fnmatchcase(key, pattern):
                    self._read.add(key)
                    self.left_out |= {key: reason} if reason else {}

    def refuse_unread(self, *sections: str) -> None:
        """Refuses values of some sections that nothing took, and notes those of others."""
        unread = [key for key in self.values if key not in self._read]
        refused = [key for key in unread if key.partition(".")[0] in sections]
        advice = f"Leave out those that do not matter, for example by --set {''.join(refused[:1])}=null"
        require(not refused, "keys that have a counterpart in this package", ", ".join(refused), advice=advice)
        self.left_out |= dict.fromkeys(unread, "nothing is known about it")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, child in value.items():
            require("." not in str(name), "keys without dots", repr(name))
            yield from _leaves(child, f"{key}.{name}".removeprefix("."))
    elif value is not None:
        yield key, value
