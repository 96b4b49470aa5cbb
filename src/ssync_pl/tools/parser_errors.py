"""Parser errors in one line: which key, what was expected, what came."""

from __future__ import annotations

import importlib
import inspect
import re

__all__ = ["explain_parser_error"]

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NOT_A_CLASS = re.compile(r"Expected a dot import path string: (.*)")
_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_CLASS_REPR = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>")
_NOISE = re.compile(r"^\s*(Subtypes:|Errors:|Given value|- Expected an? <class 'NoneType'>)")
_MISSING = re.compile(r"Validation failed: Key \"([^\"]+)\" is required|the following arguments are required: (.+)")


def explain_parser_error(message: str) -> str:
    """Condense a message of jsonargparse into a line that names the key.

    The parser lists every alternative of a Union type that failed; the one that got furthest is the one that was meant.

    Args:
        message: The message, often many lines.

    Returns:
        One line. A message of an unknown form comes back with its lines joined.

    Example:
        >>> explain_parser_error('Parser key "trainer.max_steps":\\n  Expected a <class \\'int\\'>. Got value: abc')
        "trainer.max_steps: Expected int, but got 'abc'."
    """
    missing = _MISSING.search(message)
    if missing:
        names = (missing.group(1) or missing.group(2)).replace(" ", "").split(",")
        wanted = ", ".join(re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in names)
        return f"{wanted}: Expected a value, but got none. Name it in the configuration file or as an option."
    keys: list[str] = []
    depths: list[int] = []
    best: tuple[int, str] | None = None
    class_path = ""
    for line in message.splitlines():
        depth = len(line) - len(line.lstrip(" "))
        if depths and depth <= depths[-1] and _KEY.search(line):
            while depths and depths[-1] >= depth:
                depths.pop()
                keys.pop()
        if found := _KEY.search(line):
            keys.append(found.group(1))
            depths.append(depth)
        if found := _CLASS.search(line):
            class_path = found.group(1)
        reason = _reason(line, class_path, message)
        if reason is not None and (best is None or len(keys) + depth > best[0]):
            option = _OPTION.search(line)
            path = [*keys, option.group(1)] if option else keys
            best = (len(keys) + depth, f"{'.'.join(path)}: {reason}" if path else reason)
    if best is not None:
        return best[1]
    lines = [line.strip() for line in message.splitlines() if line.strip() and not _NOISE.match(line)]
    text = _KEY.sub(r"\1", " ".join(lines)).replace("typing.", "")
    return text if text.endswith(".") else f"{text}."


def _reason(line: str, class_path: str, message: str) -> str | None:
    if found := _OPTION.search(line):
        options = _options(class_path)
        owner = class_path.rsplit(".", 1)[-1] or "this key"
        listed = f" Its options: {', '.join(options)}." if options else ""
        return f"Expected an option of {owner}, but got {found.group(1)!r}.{listed}"
    if found := _NOT_A_CLASS.search(line):
        return (
            f"Expected the name of a class, but got {found.group(1)!r}. "
            "Name a class of this package, of Lightning, or a full path like `package.module.Class`."
        )
    found = _TYPE.search(line)
    if found and "NoneType" not in found.group(1):
        expected = _CLASS_REPR.sub(r"\1", found.group(1))
        return f"Expected {expected}, but got {found.group(2)!r}."
    return None


def _options(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        signature = inspect.signature(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in signature.parameters.values() if parameter.kind in named]
