import sys

import pytest

USER_MODULE = """
import lightning.pytorch as L
import torch
from torch import nn

from ssync_pl import SSyncMaps, SSyncRegularizer

class Binder(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(6, 6)

    def forward(self, slots, features):
        for _ in range(2):
            weights = (self.query(slots) @ features.transpose(1, 2)).softmax(1)
            slots = slots + weights @ features
        return slots

class Heads(Binder):
    def forward(self, slots, features):
        query, keys = (x.unflatten(2, (2, 3)).transpose(1, 2) for x in (self.query(slots), features))
        return slots + (query @ keys.mT).softmax(2).mean(1) @ features

class Painter(nn.Module):
    def __init__(self, detach=False):
        super().__init__()
        self.place = nn.Parameter(torch.randn(16, 6))
        self.detach = detach

    def forward(self, slots):
        alpha = slots.flatten(0, 1) @ self.place.T
        masks = (alpha.detach() if self.detach else alpha).softmax(1)
        return torch.einsum("bsn,bsd->bnd", masks, slots.flatten(0, 1))

class Net(nn.Module):
    def __init__(self, slots=3, detach=False, kind=""):
        super().__init__()
        self.seeds = nn.Parameter(3 * torch.randn(1, slots, 6))
        self.eyes = nn.Linear(3, 6)
        self.place = nn.Parameter(2 * torch.randn(16, 6))
        self.binder, self.painter = Heads() if kind == "heads" else Binder(), Painter(detach)
        self.spare, self.kind = Binder(), kind

    def forward(self, video):
        features = self.eyes(video.flatten(3).transpose(2, 3)) + self.place
        slots, clip = self.seeds.repeat(len(video), 1, 1), []
        for t in range(video.shape[1]):
            if self.kind == "spare":  # whose slots nothing reads
                self.spare(slots, features[:, t])
            slots = self.binder(slots, features[:, t])
            clip.append(slots)
        return self.painter(torch.stack(clip, 0 if self.kind == "time_first" else 1))

    def loss_function(self, batch):
        return {"recon_loss": self(batch["img"]).square().mean()}

    def first_frame(self, video):
        return self(video[:, :1]).square().mean()

class Host(L.LightningModule):
    def __init__(self, automatic=True, detach=False, key="video"):
        super().__init__()
        self.net = Net(detach=detach)
        self.automatic_optimization = automatic
        self.key = key

    def training_step(self, batch, batch_idx):
        loss = self.net(batch if self.key in ("", None) else batch[self.key]).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        self.trainer.global_step  # what a host asks of its trainer
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

class Gives(Host):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def training_step(self, batch):
        loss = self.net(batch["video"]).square()
        given = {"none": None, "vector": loss.mean((1, 2)), "terms": {"recon_loss": loss.mean()}}
        return {**given, "detached": loss.mean().detach()}[self.what]

class Idle(SSyncRegularizer, Host):
    pass

class Regularized(Idle):
    maps = 16

    def training_step(self, batch, batch_idx):
        logits = torch.randn(2, 2, 3, self.maps, requires_grad=True)
        loss = super().training_step(batch, batch_idx)["loss"]
        return self.ssync(loss, SSyncMaps(attention_logits=logits, mask_logits=logits, grid=(4, 4)))

class Misshaped(Regularized):
    maps = 15

class Tokens(nn.Module):
    def forward(self, x):
        x = x.flatten(0, 1).flatten(2).transpose(1, 2)
        return (x @ x.transpose(1, 2)).softmax(2) @ x

def classifier():
    return nn.Sequential(nn.Flatten(1), nn.Linear(96, 4), nn.Softmax(1))

model = Net()
"""


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    (tmp_path / "user_code.py").write_text(USER_MODULE)
    (tmp_path / "broken_code.py").write_text("raise SystemExit('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield tmp_path
    for name in ("user_code", "broken_code"):
        sys.modules.pop(name, None)
