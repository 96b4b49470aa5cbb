"""Options that say how large stored frames are."""

from __future__ import annotations

import argparse
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["add_resize", "check_short_side", "whole_or_none"]

_RESAMPLE = ("bicubic", "bilinear", "nearest")


def whole_or_none(text: str) -> int | None:
    """Read an option that is a number or `none`.

    Args:
        text: The word.

    Returns:
        The number; None for `none`.

    Raises:
        ArgumentTypeError: It is neither.

    Example:
        >>> whole_or_none("320"), whole_or_none("none")
        (320, None)
    """
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number of pixels or `none`, but got {text!r}") from error


def add_resize(parser: Any, default: int | None) -> None:
    """Add `--short-side` and `--resample`.

    Args:
        parser: Parser, or a group of one, for `--short-side`.
        default: Pixels, or None for the size of the source.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_resize(parser, 320)
        >>> parser.parse_args(["--short-side", "none"]).short_side is None
        True
    """
    parser.add_argument(
        "--short-side",
        type=whole_or_none,
        default=default,
        metavar="PIXELS",
        help="resize frames and masks to this shorter side, keeping proportions; `none` keeps the size "
        f"(default: {'none' if default is None else default})",
    )
    parser.add_argument(
        "--resample",
        choices=_RESAMPLE,
        default="bicubic",
        help="filter for frames: bicubic and bilinear are anti-aliased when frames shrink; nearest takes the pixel "
        "under each centre; masks always go to the nearest pixel (default: bicubic)",
    )


def check_short_side(short_side: int | None) -> None:
    """Refuse sizes that no picture can have.

    Args:
        short_side: Pixels, or None.

    Raises:
        ConfigError: It is below 1 or above 8192.

    Example:
        >>> check_short_side(320)
    """
    if short_side is not None and not 1 <= short_side <= 8192:
        raise ConfigError(f"Expected --short-side to be from 1 to 8192, or none, but got {short_side}.")
