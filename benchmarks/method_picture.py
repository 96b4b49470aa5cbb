"""Draws the picture of the method card, docs/method.svg: what each half of a host teaches the other, on a toy clip.

    python benchmarks/method_picture.py

Both maps are made up: slot attention's has sharp edges, specks and two slots on one object; the decoder's is smooth and
whole inside. Everything drawn is what `ssync_loss` returns for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from torch import Tensor
from torch.nn import functional as F

from ssync_pl import SSyncMaps, SSyncOutput, ssync_loss

SIDE, SLOTS, FRAMES = 28, 4, 3
COLOURS = ["#9aa0a6", "#1f77b4", "#7fc4f5", "#e8762c", "#ffffff00"]  # background, two slots of a disk, a box, nothing


def scene() -> Tensor:
    """Returns true labels (T, H, W): 0 the background, 1 a disk and 2 a box, which move a patch per frame."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    frames = []
    for t in range(FRAMES):
        labels = torch.zeros(SIDE, SIDE, dtype=torch.long)
        labels[(y - 11) ** 2 + (x - 9 - t) ** 2 < 50] = 1
        labels[(y > 11) & (y < 23) & (x > 17 - t) & (x < 26 - t)] = 2
        frames.append(labels)
    return torch.stack(frames)


def toy_maps() -> SSyncMaps:
    """Returns both maps of the scene, (1, T, S, N)."""
    noise = torch.Generator().manual_seed(1)
    objects = F.one_hot(scene(), 3).movedim(-1, 1).float()
    slots = objects[:, [0, 1, 1, 2]]  # the disk has two slots
    attention = 5 * slots + 0.4 * torch.randn(slots.shape, generator=noise)
    specks = torch.rand(slots.shape, generator=noise) < 0.004
    attention = attention + 9 * specks
    coarse = F.avg_pool2d(F.avg_pool2d(slots, 7, 1, 3), 5, 1, 2)
    masks = 9 * coarse
    masks[:, 2] -= 0.4  # one of the two wins everywhere
    logits = [x.flatten(2)[None] for x in (attention, masks)]
    return SSyncMaps(attention_logits=logits[0], mask_logits=logits[1], grid=(SIDE, SIDE))


def draw(output: SSyncOutput) -> plt.Figure:
    """Draws the middle frame: labels, merged labels, and the patches at which each side teaches."""
    chosen = [
        torch.where(region, labels, SLOTS)
        for region, labels in ((output.boundary, output.encoder_labels), (output.interior, output.decoder_labels))
    ]
    rows = [
        (
            "slot attention",
            output.raw_encoder_labels,
            output.encoder_labels,
            chosen[0],
            "boundaries\nteach the decoder",
        ),
        ("decoder", output.raw_decoder_labels, output.decoder_labels, chosen[1], "interiors\nteach slot attention"),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(7.0, 5.6), layout="constrained")
    for line, (side, raw, merged, taught, title) in zip(axes, rows, strict=True):
        titles = [f"{side}:\nlabels", "redundant slots\nmerged", title]
        for axis, labels, text in zip(line, (raw, merged, taught), titles, strict=True):
            frame = labels[0, FRAMES // 2].numpy()
            axis.imshow(frame, cmap=ListedColormap(COLOURS), vmin=0, vmax=SLOTS, interpolation="nearest")
            axis.set_title(text, fontsize=14)
            axis.set(xticks=[], yticks=[])
    return figure


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "docs" / "method.svg"
    parser.add_argument("--out", type=Path, default=default, help="file of the picture (default: %(default)s)")
    options = parser.parse_args(args)
    grey = dict.fromkeys(("text.color", "axes.edgecolor"), "#808080")  # reads on white and on black
    with mpl.rc_context({**grey, "svg.hashsalt": "ssync_pl"}):
        figure = draw(ssync_loss(toy_maps(), merge_threshold=0.7))
        figure.savefig(options.out, transparent=True, metadata={"Date": None} if options.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
