"""Host, data and callback of a LightningCLI configuration, without a training."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning.pytorch as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ssync_pl.cli.trainer import SSyncArgumentParser, SSyncCLI
from ssync_pl.errors import ConfigError
from ssync_pl.tools.doctor.steps import quiet

__all__ = ["Configured", "from_configuration"]


class Configured(NamedTuple):
    """What a configuration makes."""

    host: L.LightningModule
    data: L.LightningDataModule | None
    callbacks: list[Any]


class _Parts(SSyncCLI):
    """Builds everything, and runs nothing."""

    found: list[Any]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        callbacks = self._get(self.config_init, "trainer").get("callbacks") or []
        self.found = callbacks if isinstance(callbacks, list) else [callbacks]
        # The configured trainer may need devices that are not here, and would open loggers.
        return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def _run_subcommand(self, subcommand: str) -> None:
        return


def from_configuration(words: list[str]) -> Configured:
    """Build what a configuration names."""
    try:
        with quiet():
            cli = _Parts(
                L.LightningModule,
                L.LightningDataModule,
                args=["fit", *words],
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                parser_class=SSyncArgumentParser,
                parser_kwargs={"prog": "ssync-pl"},
            )
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    return Configured(cli.model, cli.datamodule, cli.found)
