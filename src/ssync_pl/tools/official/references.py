"""Public configuration files: YAML whose `${…}` references OmegaConf resolves, with limits and without running code."""

from __future__ import annotations

import ast
import contextvars
import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssync_pl.errors import ConfigError

__all__ = ["evaluate", "read_config", "resolve", "timm_name", "vit_property"]

_MOST_BYTES = 1_000_000
_MOST_VALUES = 100_000
_MOST_CHARACTERS = 10_000_000
_DEEPEST = 20
_VALUES_PER_REFERENCE = 50  # OmegaConf takes a millisecond for each
_LARGEST = 1e18
_ARITHMETIC = (ast.Expr, ast.Name, ast.UnaryOp, ast.BinOp, ast.Constant)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.UAdd, ast.USub)
# What PyYAML lets escape beside its own errors, for example from `!!int abc`
_UNREADABLE = (yaml.YAMLError, ValueError, TypeError, ArithmeticError, AttributeError, LookupError, RecursionError)
_OURS = "ssync_pl."  # prefix of our functions in OmegaConf's registry, which the whole process shares
_VIT = re.compile(r"vit_(?P<size>tiny|small|base|large)_patch(?P<patch>\d+)(?:_(?P<pixels>\d+))?_\w+")
_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
_TAGS = {"dino": "dino", "mae": "mae", "dinov2": "lvd142m"}


@dataclass
class _Budget:
    """What references may still stand for: aliases and references can unfold to far more than a file holds."""

    values: int = _MOST_VALUES
    characters: int = _MOST_CHARACTERS
    depth: int = 0

    def spend(self, values: int, characters: int) -> None:
        self.values -= values
        self.characters -= characters
        if self.values < 0 or self.characters < 0 or self.depth > _DEEPEST:
            raise _TooMuchError


class _TooMuchError(BaseException):
    """Ends the reading at once: OmegaConf goes on with the next value after an `Exception`."""


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def read_config(path: str | Path, changes: Iterable[str] = ()) -> dict[str, Any]:
    """Reads a file and replaces every reference by its value.

    Args:
        path: YAML file.
        changes: `KEY=VALUE` with dotted keys, applied before references are followed, as the official scripts do.

    Returns:
        Plain dicts, lists and scalars.

    Raises:
        ConfigError: The file is missing, too large or no YAML mapping, or a reference cannot be followed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"Expected a configuration at {str(path)!r}, but there is no such file. Correct the path.")
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"Expected a configuration of at most {_MOST_BYTES} bytes, but {path} has more.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"Expected {path} to be YAML in UTF-8, but it is not ({error}). Correct it.") from error
    return resolve(text, changes, str(path))


def resolve(text: str, changes: Iterable[str] = (), source: str = "the text") -> dict[str, Any]:
    """Parses YAML and replaces `${path}`, `${.path}` and `${function: arguments}` by their values.

    Functions are `add`, `sub`, `mul`, `div`, `min`, `max`, `eval` (arithmetic only), and `config_prop` (sizes of vision
    transformers). Arguments and errors are those of `read_config`.
    """
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ModuleNotFoundError as error:
        raise ConfigError(
            'Expected OmegaConf for public configurations, but it is missing. Run `pip install "ssync-pl[official]"`.'
        ) from error
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver  # name before 2.4
    for name, function in _FUNCTIONS.items():
        register(_OURS + name, function, replace=True)
    token = _budget.set(_Budget())
    try:
        tree = _parsed(text, source)
        if not isinstance(tree, dict):
            raise ConfigError(f"Expected a YAML mapping, but got {type(tree).__name__}.")
        _measure(tree, 0)
        config = OmegaConf.create(_prefixed(tree))
        for change in changes:
            key, sign, value = change.partition("=")
            if not sign or not key:
                raise ConfigError(f"Expected a change KEY=VALUE such as trainer.max_steps=7, but got {change!r}.")
            OmegaConf.update(config, key, _prefixed(_parsed(f"value: {value}", change)["value"]), merge=False)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        return plain
    except (_TooMuchError, RecursionError) as error:
        raise ConfigError(
            f"Expected at most {_MOST_VALUES} values and {_MOST_CHARACTERS} characters, nested {_DEEPEST} deep, but "
            f"aliases or references in {source} stand for more, or refer to themselves."
        ) from error
    except (OmegaConfBaseException, ConfigError) as error:
        place: Any = getattr(error, "full_key", None)
        reason = str(error).partition("\n")[0]  # OmegaConf adds lines of its own
        reason = reason.partition("raised while resolving interpolation: ")[2] or reason
        raise ConfigError(f"In {source}{f', {str(place)[:100]}' if place else ''}: {reason[:500]}") from error
    finally:
        _budget.reset(token)


def evaluate(expression: str, values: Mapping[str, Any] | None = None) -> int | float:
    """Computes `+ - * / // % **` of numbers, parentheses and named numbers; refuses everything else.

    Raises:
        ConfigError: The text is no such expression, or a result is undefined or larger than 1e18.
    """
    import simpleeval

    evaluator = simpleeval.SimpleEval(
        operators={kind: simpleeval.DEFAULT_OPERATORS[kind] for kind in _OPERATORS}, functions={}, names=values or {}
    )
    evaluator.nodes = {kind: handle for kind, handle in evaluator.nodes.items() if kind in _ARITHMETIC}
    try:
        return _number(evaluator.eval(expression))
    except (simpleeval.InvalidExpression, SyntaxError, ArithmeticError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"Expected arithmetic of numbers such as 'a / 32 * b', but got {expression[:200]!r} ({error})."
        ) from error


def vit_property(table: str, name: str, key: str) -> int:
    """Width (`FEAT_DIM`) or number of patches (`NUM_PATCHES`) of a vision transformer, by its name in old timm."""
    found = _VIT.fullmatch(str(name))
    if table != "VIT_PARAMS" or key not in ("FEAT_DIM", "NUM_PATCHES") or found is None:
        raise ConfigError(
            "Expected FEAT_DIM or NUM_PATCHES of VIT_PARAMS for a vision transformer such as vit_base_patch16_224_dino,"
            f" but got {key!r} of {table!r} for {name!r}. Write the number itself."
        )
    if key == "FEAT_DIM":
        return _WIDTHS[found["size"]]
    return (int(found["pixels"] or 224) // int(found["patch"])) ** 2


def timm_name(name: str) -> str:
    """Name in today's timm of a backbone of the public configurations, for example of `vit_base_patch16_224_dino`."""
    head, _, ending = name.rpartition("_")
    if ending in ("msn", "mocov3", "savi"):
        raise ConfigError(
            f"Expected a backbone that timm has, but got {name!r}, which only the official code registers. Name "
            "another one of the same shape, and give its file of weights by `backbone_checkpoint`."
        )
    if ending == "dinov2":
        return f"{name}.{_TAGS[ending]}"
    return f"{head}.{_TAGS[ending]}" if ending in _TAGS else name


def _parsed(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"Expected YAML, but it cannot be read ({reason}). Correct it.") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats (`1e-4`), refusing repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"  # `<<: *defaults`, which the safe loader flattens
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        repeated = [key for number, key in enumerate(keys) if key in keys[:number]]
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _measure(value: Any, depth: int) -> None:
    """Counts what the aliases of a file stand for, before it is copied."""
    budget = _budget.get()
    budget.depth = depth
    children = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    texts = value if isinstance(value, dict) else () if isinstance(value, list) else (value,)
    budget.spend(1, sum(len(str(text)) for text in texts))
    for child in children:
        _measure(child, depth + 1)
    budget.depth = depth


def _prefixed(value: Any) -> Any:
    """Leads every reference and function to ours, so that a file reaches nothing else."""
    if isinstance(value, dict):
        return {key: _prefixed(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_prefixed(child) for child in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    text = re.sub(r"\$\{\s*([\w.]+)\s*:", rf"${{{_OURS}\1:", value)
    text = re.sub(r"\$\{\s*(\.*[\w\[][\w.\[\]-]*)\s*\}", rf"${{{_OURS}ref:'\1'}}", text)
    if text.count("${") != text.count(f"${{{_OURS}"):
        raise ConfigError(
            f"Expected references such as ${{globals.SLOTS}} or ${{mul: ${{.A}}, 2}}, but got {value[:200]!r}."
        )
    return text


def _reference(key: str, *, _parent_: Any, _root_: Any) -> Any:
    from omegaconf import Container, OmegaConf

    budget = _budget.get()
    budget.depth += 1
    budget.spend(_VALUES_PER_REFERENCE, 0)
    try:
        missing = object()
        value = OmegaConf.select(_parent_ if key.startswith(".") else _root_, key, default=missing)
    finally:
        budget.depth -= 1
    if value is missing:
        raise ConfigError(f"Expected a value at {key}, but there is none. Name one that exists.")
    plain = OmegaConf.to_container(value, resolve=False) if isinstance(value, Container) else value
    if plain is not value and "${" in str(plain):
        raise ConfigError(f"Expected a single value or plain values at {key}, but got references.")
    _measure(plain, budget.depth)
    return plain


def _number(value: Any) -> Any:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        raise ConfigError(f"Expected a number of at most {_LARGEST:.0e}, but got {str(value)[:50]!r}. Correct it.")
    return value


def _evaluated(text: Any, *values: Any) -> int | float:
    names, colon, body = str(text).partition(":")
    if not colon:
        names, body = ",".join("abcdefghijk"[: len(values)]), str(text)
    found = [name.strip() for name in names.removeprefix("lambda ").split(",") if name.strip()]
    if len(found) != len(values):
        raise ConfigError(f"Expected a value for each of the names {found}, but got {len(values)} values.")
    return evaluate(body.strip(), {name: _number(value) for name, value in zip(found, values, strict=True)})


def _folded(function: Callable[[Any, Any], Any], most: int = 100) -> Callable[..., Any]:
    def fold(*values: Any) -> Any:
        if not 0 < len(values) <= most or (most == 2 and len(values) < 2):
            raise ConfigError(f"Expected two numbers, but got {len(values)} values.")
        try:
            first, *others = map(_number, values)
            return functools.reduce(lambda a, b: _number(function(a, b)), others, first)
        except ArithmeticError as error:
            raise ConfigError(f"Expected numbers of which a result is defined, but got {list(values)}.") from error

    return fold


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ref": _reference,
    "eval": _evaluated,
    "add": _folded(operator.add),
    "sub": _folded(operator.sub, most=2),
    "mul": _folded(operator.mul),
    "div": _folded(operator.truediv, most=2),
    "min": _folded(min),
    "max": _folded(max),
    "config_prop": vit_property,
}
