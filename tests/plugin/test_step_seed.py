from __future__ import annotations

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ssync_pl.errors import ConfigError
from ssync_pl.plugin.step_seed import StepSeed

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class _Draws(L.LightningModule):
    """Notes what each generator gives in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.train_draws: list[tuple[float, ...]] = []
        self.val_draws: list[tuple[float, ...]] = []

    @staticmethod
    def _draw() -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002

    def training_step(self, batch, batch_idx):
        self.train_draws.append(self._draw())
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.val_draws.append(self._draw())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _run(seed: int, *, disturb: bool = False) -> _Draws:
    model = _Draws()
    loader = torch.utils.data.DataLoader(torch.ones(6, 1), batch_size=2)
    trainer = L.Trainer(max_epochs=2, callbacks=[StepSeed(seed)], limit_val_batches=0 if disturb else 2, **QUIET)
    torch.manual_seed(int(disturb))
    trainer.fit(model, loader, loader)
    return model


def test_numbers_depend_on_the_place_alone() -> None:
    model, disturbed, other = _run(0), _run(0, disturb=True), _run(1)
    assert model.train_draws == disturbed.train_draws
    assert len(set(model.train_draws)) == 6
    assert not set(model.train_draws) & set(other.train_draws)
    assert model.val_draws[:2] == model.val_draws[2:]
    assert len(set(model.val_draws)) == 2


def test_ranks_draw_differently_and_the_seed_comes_from_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StepSeed(0).number("fit", 0, 0, 0) != StepSeed(0).number("fit", 1, 0, 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert StepSeed().number("fit", 0, 0, 0) == StepSeed(5).number("fit", 0, 0, 0)
    with pytest.raises(ConfigError, match="`seed` to be 0 or more"):
        StepSeed(-1)


def test_accumulated_batches_are_not_lost_by_a_resume(tmp_path) -> None:
    """A checkpoint in the middle of an optimizer step is not written by a resume, and not taken."""
    loader = torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2)
    middle, saved = tmp_path / "middle.ckpt", []

    class SavesAfterOneBatch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer.save_checkpoint(middle)

    def fit(*callbacks: L.Callback, epochs: int = 2, ckpt_path: object = None) -> None:
        settings = {**QUIET, "enable_checkpointing": True, "accumulate_grad_batches": 2, "max_epochs": epochs}
        L.Trainer(callbacks=[StepSeed(0), *callbacks], **settings).fit(_Draws(), loader, ckpt_path=ckpt_path)

    first = ModelCheckpoint(tmp_path / "a", every_n_train_steps=2, save_last=True)
    fit(first, SavesAfterOneBatch(), epochs=1)
    again = ModelCheckpoint(tmp_path / "b", every_n_train_steps=2)
    again._save_checkpoint = lambda trainer, path: saved.append(trainer.global_step)
    fit(again, ckpt_path=first.last_model_path)
    assert saved == [4]
    with pytest.raises(ConfigError, match="1 of 2 accumulated batches"):
        fit(ckpt_path=middle)
