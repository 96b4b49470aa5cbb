from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from sold_hosts import SoldHost, sold_batch
from torch import Tensor

from ssync_pl import SSyncCallback, ssync_loss
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps


class _Seen(L.Callback):
    """Total loss before backward, and what Lightning hands on of the step's outputs."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []
        self.outputs: list[dict[str, Tensor]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.totals.append(loss.detach().clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        self.outputs.append(outputs)


def _fit(host: SoldHost, *callbacks: L.Callback, clip: float | None = 0.05) -> None:
    trainer = L.Trainer(
        max_steps=3, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=clip,
    )  # fmt: skip
    trainer.fit(host, torch.utils.data.DataLoader([sold_batch() for _ in range(3)], batch_size=None))


def test_three_steps_of_the_callback_around_a_step_that_returns_a_dict() -> None:
    torch.manual_seed(0)
    host, seen = SoldHost(), _Seen()
    keys = list(host.state_dict())
    _fit(host, SSyncCallback(warmup_steps=0, merge=False), seen)
    assert len(seen.totals) == 3
    assert list(host.state_dict()) == keys
    assert not any(module._forward_hooks for module in host.modules())
    corrector, decoder = host.autoencoder.corrector, host.autoencoder.decoder
    # Tensors of the last step, which the host keeps itself.
    attention = torch.stack(corrector.own_logits, 1)
    masks = decoder.own_alpha.unflatten(0, attention.shape[:2]).flatten(3)
    maps = SSyncMaps(attention_logits=attention, mask_logits=masks, grid=(8, 8))
    expected = host.outputs[-1]["reconstruction_loss"] + ssync_loss(maps, merge=False).loss
    torch.testing.assert_close(seen.totals[-1], expected.detach())
    # The host's own entries reach its other callbacks as before.
    assert {"reconstructions", "masks", "reconstruction_loss", "loss"} <= set(seen.outputs[-1])
    assert host.outputs[-1]["loss"] is host.outputs[-1]["reconstruction_loss"]


def test_the_second_stage_optimises_by_hand_and_is_refused() -> None:
    with pytest.raises(HostError, match="automatic_optimization=False: it calls backward itself"):
        _fit(SoldHost(manual=True), SSyncCallback(warmup_steps=0), clip=None)
