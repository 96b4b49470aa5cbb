"""One picture of the same host without and with SSync: frames, true objects and labels of validation videos.

``python benchmarks/picture.py --config examples/quickstart.yaml --without A.ckpt --with B.ckpt --out maps.png`` takes
two checkpoints of one configuration, as ``ssync-pl compare`` leaves them in ``RUN/checkpoints/last.ckpt``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from ssync_pl import data, hosts
from ssync_pl.data.files import refuse_foreign, write_bytes
from ssync_pl.metrics import MAPS
from ssync_pl.tools import viz
from ssync_pl.tools.predict.windows import match_slots

SHOWN = ("encoder_", "")  # slot attention's map and the decoder's, by their names in MAPS


def evaluate(kind: str, checkpoint: Path, batch: dict) -> dict[str, NDArray[np.int64]]:
    """Labels ``(B, T, H, W)`` of every map of a trained host, by its class's name."""
    host = getattr(hosts, kind).load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    with torch.no_grad():
        found = host.eval().evaluate(batch).labels(batch["segmentations"].shape[-2:])
    return {name: labels.numpy() for name, labels in found.items()}


def colored(labels: NDArray[np.int64], truth: NDArray[np.int64], slots: int) -> viz.Bytes:
    """Labels ``(T, H, W)`` in colours: of the object that a slot covers best; slots mostly on background are grey."""
    count = max(slots, int(truth.max()) + 1)
    numbers = match_slots(truth, labels, count)
    for slot in np.unique(labels):
        if np.bincount(truth[(labels == slot) & (truth >= 0)], minlength=1).argmax() == 0:
            numbers[slot] = 0
        elif numbers[slot] == 0:  # a second slot of an object: a colour that no object has
            numbers[slot] = count
    return viz.color_labels(numbers[labels], background=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("config", "without", "with", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, dest=f"{name}_path")
    parser.add_argument("--videos", type=int, default=4, help="validation videos, two frames of each")
    parser.add_argument("--root", type=Path, help="folder of the generated data, where it is not the configuration's")
    options = parser.parse_args()
    refuse_foreign(options.out_path, viz.SHEET)
    config = yaml.safe_load(options.config_path.read_text("utf-8"))
    arguments = dict(config["data"]["init_args"], batch_size=options.videos)
    if options.root is not None:
        arguments["root"] = str(options.root)
    L.seed_everything(0)
    module = getattr(data, config["data"]["class_path"])(**arguments)
    module.prepare_data()
    module.setup("validate")
    batch = module.on_after_batch_transfer(next(iter(module.val_dataloader())), 0)
    last = batch["video"].shape[1] - 1
    objects = viz.label_masks(batch["segmentations"].numpy())
    frames = viz.to_uint8(batch["video"].numpy(), getattr(module, "mean", None), getattr(module, "std", None))

    def cells(values: viz.Bytes) -> viz.Bytes:
        return values[:, [0, last]].reshape(-1, *values.shape[2:])

    rows = [("video", cells(frames)), ("true objects", cells(viz.color_labels(objects, background=0)))]
    slots = config["model"]["init_args"]["num_slots"]
    for title, checkpoint in (("without SSync", options.without_path), ("with SSync", options.with_path)):
        found = evaluate(config["model"]["class_path"], checkpoint, batch)
        for name in SHOWN:
            drawn = np.stack([colored(*pair, slots) for pair in zip(found[name], objects, strict=True)])
            words = "decoder" if name == "" else MAPS[name]
            rows.append((f"{title}\n{words}", cells(drawn)))
    write_bytes(options.out_path, viz.encode_png(viz.draw_sheet(rows), viz.SHEET))


if __name__ == "__main__":
    main()
