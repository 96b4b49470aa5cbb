"""What is wrong with a file that `--ckpt_path` names, in one line."""

from __future__ import annotations

from ssync_pl.errors import ConfigError

__all__ = ["bad_checkpoint", "other_checkpoint"]

_LONGEST = 300


def bad_checkpoint(error: Exception) -> ConfigError:
    """Explain that a file cannot be read as a checkpoint."""
    reason = str(error).splitlines()[0] if str(error) else "it ends early"
    return ConfigError(
        f"Expected --ckpt_path to be a whole checkpoint, but reading it failed ({type(error).__name__}: {reason}). "
        "Take another one; --debug shows where."
    )


def other_checkpoint(error: Exception) -> ConfigError:
    """Explain that a checkpoint holds the tensors of another model."""
    reason = " ".join(" ".join(str(error).splitlines()[1:]).split())
    reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}…"
    return ConfigError(
        f"Expected --ckpt_path to hold the tensors of the model in the configuration, but {reason} Take the "
        "configuration that it was trained with; a public checkpoint with further parts goes through "
        "`ssync-pl checkpoint convert`."
    )
