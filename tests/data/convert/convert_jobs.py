"""Decoders that spawned workers can import, and a main program that can be killed."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.convert.writer import ConversionReport, Item, convert
from ssync_pl.errors import ShardError


def items(count: int) -> list[Item]:
    return [Item(f"{number:06d}", {"color": number}) for number in range(count)]


def members(color: int) -> dict[str, Any]:
    video = np.full((2, 8, 8, 3), color, np.uint8)
    masks = np.zeros((2, 8, 8, 1), np.uint8)
    masks[:, :, : color % 8] = 1
    return {"video.npy": video, "segmentations.npy.gz": masks, "info.json": {"color": color}}


def paint(item: Item) -> dict[str, Any]:
    # A program that is to be stopped must not be able to finish first, however slow its killer is.
    if item.source["color"] >= int(os.environ.get("CONVERT_JOBS_HANG_FROM", "256")):
        time.sleep(600)
    return members(item.source["color"])


@dataclass(frozen=True)
class PaintExcept:
    """Refuses the colours that a file lists."""

    bad: Path

    def __call__(self, item: Item) -> dict[str, Any]:
        if item.source["color"] in json.loads(self.bad.read_text()):
            raise ShardError(f"Expected colour {item.source['color']} to be good, but it is bad.")
        return members(item.source["color"])


def die(item: Item) -> dict[str, Any]:
    os._exit(9)


def run(out: Path | str, count: int = 12, workers: int = 0, **options: Any) -> ConversionReport:
    settings = {"recipe": {"source": "paint"}, "samples_per_shard": 3, "progress": False, **options}
    decode = settings.pop("decode", paint)
    return convert(items(count), decode, out, "colors-train", num_workers=workers, **settings)


if __name__ == "__main__":
    import convert_jobs

    convert_jobs.run(sys.argv[1], workers=int(sys.argv[2]))
