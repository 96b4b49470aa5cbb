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

from ssync_pl.data.convert.writer import ConversionReport, convert
from ssync_pl.errors import ShardError


def sources(count: int) -> list[dict[str, int]]:
    return [{"color": number} for number in range(count)]


def members(color: int) -> dict[str, Any]:
    video = np.full((2, 8, 8, 3), color, np.uint8)
    masks = np.zeros((2, 8, 8, 1), np.uint8)
    masks[:, :, : color % 8] = 1
    return {"video.npy": video, "segmentations.npy.gz": masks, "info.json": {"color": color}}


def paint(source: dict[str, int]) -> dict[str, Any]:
    # A program that is to be stopped must not be able to finish first, however slow its killer is.
    if source["color"] >= int(os.environ.get("CONVERT_JOBS_HANG_FROM", "256")):
        time.sleep(600)
    return members(source["color"])


@dataclass(frozen=True)
class PaintExcept:
    """Refuses the colours that a file lists."""

    bad: Path

    def __call__(self, source: dict[str, int]) -> dict[str, Any]:
        if source["color"] in json.loads(self.bad.read_text()):
            raise ShardError(f"Expected colour {source['color']} to be good, but it is bad.")
        return members(source["color"])


def die(source: dict[str, int]) -> dict[str, Any]:
    os._exit(9)


def run(out: Path | str, count: int = 12, workers: int = 0, **options: Any) -> ConversionReport:
    settings = {"recipe": {"source": "paint"}, "samples_per_shard": 3, "progress": False, **options}
    decode = settings.pop("decode", paint)
    return convert(sources(count), decode, out, "colors-train", num_workers=workers, **settings)


if __name__ == "__main__":
    import convert_jobs

    convert_jobs.run(sys.argv[1], workers=int(sys.argv[2]))
