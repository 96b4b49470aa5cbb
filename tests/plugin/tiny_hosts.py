"""A host of a few hundred parameters with SAVi's shape, and the ways in which hosts differ."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback, SSyncMaps, SSyncRegularizer, ssync_loss

SLOTS, DIM, GRID, FRAMES = 4, 6, (3, 4), 2
PATHS = {"attention": "corrector:logits", "masks": "decoder:mask_logits", "grid": GRID}
PATHS |= {"attention_kind": "logits", "masks_kind": "logits"}
Corrected = namedtuple("Corrected", ["slots", "logits"])
Decoded = namedtuple("Decoded", ["reconstruction", "mask_logits"])


class TinyCorrector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.update, self.soft, self.detach = nn.Linear(DIM, DIM), nn.Softmax(1), False

    def forward(self, slots: Tensor, features: Tensor) -> Corrected:
        logits = 3 * torch.einsum("bsd,bnd->bsn", self.to_q(slots), self.to_k(features))
        weights = self.soft(logits)
        weights = weights / weights.sum(2, keepdim=True)
        slots = slots + self.update(weights @ features)
        return Corrected(slots, logits.detach() if self.detach else logits)


class TinyDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(GRID[0] * GRID[1], DIM))
        self.to_mask, self.to_color = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, 3)
        self.detach, self.nan, self.extra_slots, self.bias = False, False, 0, 0.0

    def forward(self, slots: Tensor) -> Decoded:
        logits = torch.einsum("btsd,nd->btsn", self.to_mask(slots), self.position)
        logits = logits + self.bias * torch.eye(logits.shape[2])[:, :1]
        logits = logits * torch.nan if self.nan else logits
        reconstruction = torch.einsum("btsn,btsc->btnc", logits.softmax(2), self.to_color(slots))
        logits = torch.cat([logits, logits[:, :, : self.extra_slots]], dim=2) if self.extra_slots else logits
        return Decoded(reconstruction, logits.detach() if self.detach else logits)


class TinyParts:
    """Everything but the base class, so that both Lightning namespaces can use it."""

    automatic, lr = True, 1e-3
    collapse_at: int | None = None

    def __init__(self, returns: str = "tensor", checkpointing: str = "", grow: bool = False):
        super().__init__()
        self.initial = nn.Parameter(torch.randn(1, SLOTS, DIM))
        self.encoder, self.corrector, self.decoder = nn.Linear(3, DIM), TinyCorrector(), TinyDecoder()
        self.automatic_optimization = self.automatic
        self.returns, self.checkpointing, self.grow = returns, checkpointing, grow

    def forward(self, video: Tensor) -> tuple[Tensor, Decoded]:
        features = self.encoder(video.flatten(3).transpose(2, 3))
        count = min(SLOTS, 2 + self.global_step // 2) if self.grow else SLOTS
        slots = self.initial[:, :count].repeat(video.shape[0], 1, 1)
        clip, logits = [], []
        for t in range(video.shape[1]):
            if self.checkpointing:
                out = checkpoint(self.corrector, slots, features[:, t], use_reentrant=self.checkpointing == "reentrant")
            else:
                out = self.corrector(slots, features[:, t])
            slots = out[0]
            clip.append(slots)
            logits.append(out[1])
        return torch.stack(logits, 1), self.decoder(torch.stack(clip, 1))

    def host_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if self.collapse_at is not None:
            self.decoder.bias = 50.0 if self.global_step >= self.collapse_at else 0.0
        logits, decoded = self(batch["video"])
        target = batch["video"].flatten(3).transpose(2, 3)
        return (decoded.reconstruction - target).square().mean(), logits, decoded.mask_logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.returns == "none" and batch_idx % 2 == 0:
            return None
        loss = self.host_loss(batch)[0]
        if self.returns == "dict":
            self.kept = {"loss": loss, "aux": loss.detach()}
            return self.kept
        return [loss] if self.returns == "list" else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.host_loss(batch)[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class TinyHost(TinyParts, L.LightningModule):
    pass


class HandWritten(TinyHost):
    options: ClassVar[dict[str, Any]] = {}
    start = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, logits, masks = self.host_loss(batch)
        return loss if self.global_step < self.start else loss + ssync_loss(maps_of(logits, masks), **self.options).loss


class Late(HandWritten):
    start = 2


class ManualHost(TinyHost):
    automatic = False


class MixinHost(SSyncRegularizer, TinyHost):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, logits, masks = self.host_loss(batch)
        return self.ssync(loss, maps_of(logits, masks))


def maps_of(logits: Tensor, masks: Tensor) -> SSyncMaps:
    return SSyncMaps(attention_logits=logits, mask_logits=masks, grid=GRID)


def make_host(kind: type = TinyHost, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return kind(**options)


def make_callback(kind: type[SSyncCallback] = SSyncCallback, **options: Any) -> SSyncCallback:
    return kind(**{"warmup_steps": 0, **PATHS, **options})


def either(mixin: bool, **settings: Any) -> tuple[Any, list[SSyncCallback]]:
    return (make_host(MixinHost, ssync=settings), []) if mixin else (make_host(), [make_callback(**settings)])


def make_clips(count: int = 8, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"video": torch.rand((FRAMES, 3, *GRID), generator=generator)} for _ in range(count)]


def make_loader(count: int = 8, batch_size: int = 2) -> DataLoader:
    return DataLoader(make_clips(count), batch_size=batch_size)  # type: ignore[arg-type]


def make_trainer(*callbacks: Any, steps: int = 4, trainer: Any = L.Trainer, **options: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    steps = {"max_steps": steps, "log_every_n_steps": 1}
    return trainer(callbacks=list(callbacks), **{"accelerator": "cpu", "devices": 1, **quiet, **steps, **options})


def fit(host: Any, *callbacks: Any, steps: int = 4, loader: DataLoader | None = None, **options: Any) -> Any:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(*callbacks, steps=steps, **options)
    trainer.fit(host, make_loader() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def weights(host: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in host.state_dict().items()}


def hooks_of(host: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules())


def assert_same_weights(one: nn.Module, two: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(weights(one), weights(two), **tolerance)


def assert_untouched(host: nn.Module) -> None:
    assert "training_step" not in host.__dict__
    assert hooks_of(host) == 0


EXACT = {"rtol": 0, "atol": 0}


def in_hook(hook: str, call: Callable[..., Any]) -> L.Callback:
    callback = L.Callback()
    setattr(callback, hook, call)
    return callback


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []
        self.logs: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs is not None and len(outputs):
            self.losses.append(outputs["loss"].detach().clone())
        self.logs.append({k: float(v) for k, v in trainer.callback_metrics.items()})
