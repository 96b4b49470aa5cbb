"""SSync (Selective Synergistic Learning) as a plug-in for video object-centric models.

Public names are imported on first use, so that ``import ssync_pl`` costs little and pulls in neither Lightning nor
webdataset.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssync_pl.attached import AttachedSSync, attach
    from ssync_pl.callback import SSyncCallback
    from ssync_pl.config import SSyncConfig
    from ssync_pl.dense_callback import DenseAlignmentCallback
    from ssync_pl.functional.ssync import SSyncOutput, ssync_loss
    from ssync_pl.lightning_host import LightningHost
    from ssync_pl.maps import SSyncMaps
    from ssync_pl.pictures import SSyncPictures
    from ssync_pl.predictions import SlotPredictions
    from ssync_pl.regularizer import SSyncRegularizer
    from ssync_pl.step_seed import StepSeed
    from ssync_pl.summary import ValidationSummary

__version__ = "0.1.0"

_HOMES = {
    "AttachedSSync": "ssync_pl.attached",
    "DenseAlignmentCallback": "ssync_pl.dense_callback",
    "LightningHost": "ssync_pl.lightning_host",
    "SSyncCallback": "ssync_pl.callback",
    "SSyncConfig": "ssync_pl.config",
    "SSyncMaps": "ssync_pl.maps",
    "SSyncOutput": "ssync_pl.functional.ssync",
    "SSyncPictures": "ssync_pl.pictures",
    "SSyncRegularizer": "ssync_pl.regularizer",
    "SlotPredictions": "ssync_pl.predictions",
    "StepSeed": "ssync_pl.step_seed",
    "ValidationSummary": "ssync_pl.summary",
    "attach": "ssync_pl.attached",
    "ssync_loss": "ssync_pl.functional.ssync",
}

__all__ = [
    "AttachedSSync",
    "DenseAlignmentCallback",
    "LightningHost",
    "SSyncCallback",
    "SSyncConfig",
    "SSyncMaps",
    "SSyncOutput",
    "SSyncPictures",
    "SSyncRegularizer",
    "SlotPredictions",
    "StepSeed",
    "ValidationSummary",
    "__version__",
    "attach",
    "ssync_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
