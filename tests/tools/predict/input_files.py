import json

import numpy as np
import pytest
from PIL import Image

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
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_frames(path, video):
    path.mkdir()
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(path / f"f{number}.png")
    return path


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
