"""What each process of the distributed test runs; a module of its own, so that a spawned process can import it."""

import os
import warnings
from pathlib import Path
from typing import Any

import tiny_hosts as tiny
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from metric_helpers import scores_of
from test_datamodule import PLAIN, Watcher
from tiny_hosts import HandWritten, Recorder, TinyHost, fit, make_callback, make_clips, make_host
from torch.utils.data import DataLoader

from ssync_pl import SSyncMaps, ssync_loss
from ssync_pl.data import ShardDataModule
from ssync_pl.hosts import SlotContrast
from ssync_pl.rivals.dense_callback import DenseAlignmentCallback

# What each case hands to the callback, and to the strategy.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "find_unused": ({}, {"find_unused_parameters": True}),
    "static_graph": ({"warmup_steps": 2, "guard_window": 1}, {"static_graph": True}),
    "relative": ({"relative_weight": 0.2}, {}),
    "gradient": ({"gradient_share": 0.2}, {}),
    "compiled": ({"sync_counts": True}, {}),
    "dict": ({}, {}),
}
STEPS = 3
# Clips (2, T, S, N) of both maps, one for each rank, whose ranks select different numbers of patches; and options. In
# the last one a single patch is selected in all, so that the mean of the counts over ranks is below 1.
COUNTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "brier": ((2, 2, 3, 9), {}),
    "ce": ((2, 2, 3, 9), {"loss": "ce"}),
    "one patch": ((2, 1, 2, 9), {"loss": "ce", "n_bd": 8, "merge": False}),
}


def loss_and_gradients(case: str, videos: slice, **options: Any) -> tuple[Any, ...]:
    shape, settings = COUNTS[case]
    generator = torch.Generator().manual_seed(0)
    d, a = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    few = d[int(shape[1] > 1) :]  # all of the clips, or the second of them
    few.zero_()[:, :, 0] = 1.0
    few[0, 0, 1, 4] = 2.0
    leaves = [x[videos].clone().requires_grad_() for x in (d, a)]
    loss = ssync_loss(SSyncMaps(*leaves, grid=(3, 3)), **settings, **options).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


class OneSided(TinyHost):
    def host_loss(self, batch: Any) -> Any:
        if self.global_rank == 1:
            self.collapse_at = 4
        return super().host_loss(batch)


def fit_rank(host: Any, *callbacks: Any, steps: int = STEPS, clips: Any = None, **options: Any) -> Any:
    """Every second clip: Lightning's own sampler would shuffle them."""
    clips = make_clips(8) if clips is None else clips
    data = DataLoader(clips[int(os.environ["LOCAL_RANK"]) :: 2], batch_size=2)
    ddp = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment(), **options)
    return fit(host, *callbacks, steps=steps, loader=data, devices=2, use_distributed_sampler=False, strategy=ddp)


def run_rank(index: int, first: int, port: int, folder: str) -> None:
    rank = first + index
    warnings.simplefilter("ignore")
    # These make Lightning believe that its processes were started from outside.
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.chdir(folder)
    results: dict[str, Any] = {}
    for name, (options, ddp) in CASES.items():
        host, recorder = make_host(returns="dict" if name == "dict" else "tensor"), Recorder()
        if name == "compiled":
            host.corrector.compile(backend="eager")
        fit_rank(host, make_callback(**options), recorder, **ddp)
        results[name] = {"gradients": recorder.gradients, "weights": tiny.weights(host), "hooks": tiny.hooks_of(host)}
    by_hand, recorder = make_host(HandWritten), Recorder()
    fit_rank(by_hand, recorder)
    results["by_hand"] = {"gradients": recorder.gradients, "weights": tiny.weights(by_hand)}
    host, callback = dense_host(), dense_callback()
    torch.manual_seed(rank)  # the ranks draw other projections
    fit_rank(host, callback, clips=dense_clips())
    results["dense"] = {"host": host.state_dict(), "projections": callback.state_dict()["projections"]}
    results["stop"], results["data"] = _stop(), _data(folder)
    results["counts"] = {c: loss_and_gradients(c, slice(rank, rank + 1), sync_counts=True) for c in COUNTS}
    results["metrics"] = scores_of(slice(0, 1) if rank == 0 else slice(1, 3))  # uneven on purpose
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def dense_host() -> SlotContrast:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"backbone": None, "feature_dim": 6, "grid": (3, 4), "decoder_hidden": (8,)}
    return SlotContrast(num_slots=3, slot_dim=8, warmup_steps=1, contrast_weight=0.0, **sizes)


def dense_callback() -> DenseAlignmentCallback:
    return DenseAlignmentCallback(warmup_steps=0, neighbours=2, redundancy_weight=0.1, redundancy_steps=9)


def dense_clips() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"features": torch.randn(2, 12, 6, generator=generator)} for _ in range(4 * STEPS)]


def _data(folder: str) -> dict[str, Any]:
    """What a rank sees of the shards in the folder, which are numbered."""
    host, patterns = Watcher(), [f"{folder}/{split}-*.tar" for split in ("train", "validation")]
    ddp = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
    trainer = tiny.make_trainer(devices=2, strategy=ddp, steps=-1, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(host, datamodule=ShardDataModule(*patterns, batch_size=2, **PLAIN))
    return {"trained": host.trained, "validated": host.validated, "steps": host.steps}


def _stop() -> dict[str, Any]:
    weights = {"boundary_weight": 1e-3, "interior_weight": 1e-3}
    guard = {"guard_window": 2, "on_collapse": "stop", "collapse_threshold": 0.65}
    callback = make_callback(warmup_steps=2, **guard, **weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit_rank(make_host(OneSided, seed=2), callback, steps=40)
    told = [str(w.message) for w in caught if "Slots fall out of use" in str(w.message)]
    return {"step": trainer.global_step, "told": len(told), "stop": bool(trainer.should_stop)}
