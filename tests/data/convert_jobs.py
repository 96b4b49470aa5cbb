"""Decoders that spawned workers can import, and a main program that can be killed."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssync_pl.data.convert.writer import convert
from ssync_pl.errors import ShardError


def members(color):
    video = np.full((2, 8, 8, 3), color, np.uint8)
    masks = np.zeros((2, 8, 8, 1), np.uint8)
    masks[:, :, : color % 8] = 1
    return {"video.npy": video, "segmentations.npy.gz": masks, "info.json": {"color": color}}


def paint(color):
    # A program that is to be stopped must not be able to finish first, however slow its killer is.
    if color >= int(os.environ.get("CONVERT_JOBS_HANG_FROM", "256")):
        time.sleep(600)
    return members(color)


@dataclass(frozen=True)
class PaintExcept:
    """Refuses the colours that a file lists."""

    bad: Path

    def __call__(self, color):
        if color in json.loads(self.bad.read_text()):
            raise ShardError(f"Expected colour {color} to be good, but it is bad.")
        return members(color)


def die(color):
    os._exit(9)


def run(out, colors=range(12), prefix="colors-train", workers=0, **options):
    settings = {"decode": paint, "recipe": {"source": "paint"}, "samples_per_shard": 3, **options}
    return convert(list(colors), out=out, prefix=prefix, num_workers=workers, **settings)


if __name__ == "__main__":
    import convert_jobs

    convert_jobs.run(sys.argv[1], workers=1)
