"""SSync (Selective Synergistic Learning) as a plug-in for video object-centric models.

Public names are imported on first use, so that ``import ssync_pl`` costs little and pulls in neither Lightning nor
webdataset.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssync_pl.method.loss import SSyncOutput, ssync_loss
    from ssync_pl.method.maps import SSyncMaps
    from ssync_pl.plugin.attach import AttachedSSync, attach
    from ssync_pl.plugin.callback import SSyncCallback
    from ssync_pl.plugin.config import SSyncConfig
    from ssync_pl.plugin.lightning_host import LightningHost
    from ssync_pl.plugin.regularizer import SSyncRegularizer
    from ssync_pl.plugin.step_seed import StepSeed
    from ssync_pl.rivals.dense_callback import DenseAlignmentCallback
    from ssync_pl.tools.pictures import SSyncPictures
    from ssync_pl.tools.predict.writer import SlotPredictions
    from ssync_pl.tools.summary import ValidationSummary

__version__ = "0.2.0"

_HOMES = {
    "AttachedSSync": "ssync_pl.plugin.attach",
    "DenseAlignmentCallback": "ssync_pl.rivals.dense_callback",
    "LightningHost": "ssync_pl.plugin.lightning_host",
    "SSyncCallback": "ssync_pl.plugin.callback",
    "SSyncConfig": "ssync_pl.plugin.config",
    "SSyncMaps": "ssync_pl.method.maps",
    "SSyncOutput": "ssync_pl.method.loss",
    "SSyncPictures": "ssync_pl.tools.pictures",
    "SSyncRegularizer": "ssync_pl.plugin.regularizer",
    "SlotPredictions": "ssync_pl.tools.predict.writer",
    "StepSeed": "ssync_pl.plugin.step_seed",
    "ValidationSummary": "ssync_pl.tools.summary",
    "attach": "ssync_pl.plugin.attach",
    "ssync_loss": "ssync_pl.method.loss",
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
