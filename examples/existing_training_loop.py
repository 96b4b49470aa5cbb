"""SSync in a training loop of plain PyTorch: the lines to add are marked with a star.

The model below stands for yours: slot attention over patches, a decoder with one mask a slot, names of its own. It is
in no list of known hosts, so the places of its two maps are named. Run it with
``python examples/existing_training_loop.py``; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from ssync_pl import attach  # * 1: import
from ssync_pl.data.synthetic import preset, render_video
from ssync_pl.hosts.nn.initializers import GaussianSlots
from ssync_pl.hosts.nn.slot_attention import SlotAttention


class Decompose(nn.Module):
    """Finds objects in clips ``(B, T, 3, H, W)`` by rebuilding pixels averaged over patches."""

    def __init__(self, slots: int = 6, dim: int = 32, patch: int = 4, grid: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.places = nn.Parameter(0.1 * torch.randn(grid * grid, dim))
        self.start = GaussianSlots(slots, dim)
        self.binding = SlotAttention(dim, mlp_hidden=64)
        self.painter = Painter(dim, grid * grid)
        self.pool = nn.AvgPool2d(patch)

    def forward(self, clip: Tensor) -> Tensor:
        """Return the mean squared error of the rebuilt patches, 0-dim."""
        frames, slots = [], self.start(clip)
        for frame in clip.unbind(1):
            patches = self.embed(frame).flatten(2).mT + self.places
            slots = self.binding(slots, patches, iterations=1 if frames else 3).slots
            frames.append(slots)
        colours, _ = self.painter(torch.stack(frames, dim=1))
        target = self.pool(clip.flatten(0, 1)).flatten(2).mT.unflatten(0, clip.shape[:2])
        return (colours - target).square().mean()


class Painter(nn.Module):
    """Each slot paints every patch and says how much the patch is its own."""

    def __init__(self, dim: int, patches: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.1 * torch.randn(patches, dim))
        self.layers = nn.Sequential(nn.Linear(dim, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Turn slots ``(B, T, S, D)`` into colours ``(B, T, N, 3)`` and alpha logits ``(B, T, S, N)``."""
        painted = self.layers(slots.unsqueeze(3) + self.places)
        alpha = painted[..., 3]
        return torch.einsum("btsn,btsnc->btnc", alpha.softmax(2), painted[..., :3]), alpha


def main(args: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--videos", type=int, default=16, help="videos to generate")
    parser.add_argument("--seed", type=int, default=0, help="seed of model and data")
    options = parser.parse_args(args)
    torch.manual_seed(options.seed)

    scene = preset("a_zoom", resolution=64, frames=2)
    videos = [render_video(scene, options.seed, index)["video"] for index in range(options.videos)]
    clips = torch.stack([torch.from_numpy(video) for video in videos]).movedim(-1, 2) / 127.5 - 1
    model = Decompose()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    with attach(  # * 2: listen to the model
        model,
        attention="binding:logits",
        attention_kind="logits",
        masks="painter:1",
        masks_kind="logits",
        total_steps=options.steps,
        warmup_ratio=0.5,
        relative_weight=0.1,
    ) as ssync:
        for step in range(options.steps):
            batch = clips[torch.randint(len(clips), (4,))]
            loss = model(batch)
            total = ssync.add(loss)  # * 3: the loss to train on
            optimizer.zero_grad()
            total.backward()  # was loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if (step + 1) % 50 == 0:
                print(f"step {step + 1:4d}  loss {losses[-1]:.4f}  SSync adds {float(total.detach()) - losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
