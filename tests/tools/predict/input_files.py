import json

import numpy as np
from folder_sets import encode_file, write_pictures

from ssync_pl.data import ShardWriter


def moving(frames, height=24, width=40):
    """A red square that moves to the right and a green one that moves to the left."""
    video = np.full((frames, height, width, 3), 60, np.uint8)
    for time, frame in enumerate(video):
        at = min(time, width - 8)
        frame[4:10, at : at + 8] = (220, 40, 40)
        frame[14:20, width - at - 8 : width - at] = (40, 200, 60)
    return video


def write_video(path, video):
    return encode_file(path, video, "mpeg4", "yuv420p")


def write_frames(path, video):
    return write_pictures(path, video, "f{}.png")


def write_shard(folder, *videos, prefix="clips"):
    with ShardWriter(folder, prefix) as writer:
        for number, video in enumerate(videos):
            writer.write(str(number), {"video.npy": video})
    return folder / f"{prefix}-000000.tar"


def index(out):
    return json.loads((out / "index.json").read_text())["videos"]


def labels_of(out, name):
    with np.load(out / f"{name}.labels.npz") as stored:  # allow_pickle is off
        assert stored.files == ["labels"]
        return stored["labels"]
