from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from tap_hosts import (
    UnknownHost,
    UnknownImages,
    make_unknown,
    tap_clip,
)
from torch import nn
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback, attach
from ssync_pl.errors import HostError

TAPS = ("softmax:binder", "softmax:painter")


def fit(host: Any, callback: SSyncCallback, batches: list[Any], **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(host, DataLoader(batches, batch_size=None))
    return trainer


def test_training_with_the_callback_where_the_host_itself_calls_the_softmax() -> None:
    torch.manual_seed(0)
    host = UnknownHost(UnknownImages())
    with torch.no_grad():
        host.net.seeds.mul_(5)
    callback = SSyncCallback(attention="softmax:.", masks="softmax:.", warmup_steps=0)
    trainer = fit(host, callback, [{"image": tap_clip(seed=i)[:, 0]} for i in range(3)])
    assert trainer.callback_metrics["ssync/interior_loss"] + trainer.callback_metrics["ssync/boundary_loss"] > 0
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_host_inside_ddp(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        host = make_unknown()
        ddp = nn.parallel.DistributedDataParallel(host)
        with attach(ddp, attention=TAPS[0], masks=TAPS[1], warmup_steps=0) as ssync:
            for seed in range(2):
                host.forget()
                loss = ddp(tap_clip(seed=seed)).square().mean()
                ssync.add(loss).backward()
                assert torch.equal(ssync.maps.attention_logits, host.own()[0])
        assert host.binder.to_q.weight.grad.any()
    finally:
        dist.destroy_process_group()


def test_reentrant_checkpointing_is_refused() -> None:
    host = UnknownHost()
    host.net.checkpointing = "reentrant"
    callback = SSyncCallback(attention="softmax:net.binder", masks="softmax:net.painter", warmup_steps=0)
    with pytest.raises(HostError, match="slot attention of UnknownHost to carry gradient"):
        fit(host, callback, [{"video": tap_clip()}])
