from pathlib import Path

import numpy as np
import pytest
from input_files import moving, write_frames, write_shard, write_video
from PIL import Image

from ssync_pl.errors import ConfigError, ShardError
from ssync_pl.tools.predict.inputs import find_videos


def test_every_kind_of_input(tmp_path: Path) -> None:
    video = moving(4)
    clips = tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "b10.mp4", video)
    write_video(clips / "b9: 1.avi", video)
    write_frames(clips / "c[1]", video[:3])
    (clips / "c_masks").mkdir()
    (clips / "notes.txt").write_text("")
    pictures = [Image.fromarray(frame) for frame in video]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=200)
    write_shard(tmp_path / "shards", video[:2], video[:3])
    shard = write_shard(tmp_path / "shards", video[:1], prefix="more")
    inputs = [clips, tmp_path / "shards", shard, clips / "c[1]", tmp_path / "a.gif"]
    found = find_videos([str(path) for path in inputs])
    assert [item.key for item in found] == ["b9: 1", "b10", "c[1]", "0", "1", "0", "0", "c[1]", "a"]
    assert [sum(1 for _ in item.frames()) for item in found] == [4, 4, 3, 2, 3, 1, 1, 3, 4]
    assert [item.rate for item in (found[1], found[2], found[8])] == [10, None, 5]
    assert np.array_equal(np.stack(list(found[2].frames())), video[:3])
    assert np.array_equal(np.stack(list(found[3].frames())), video[:2])


def bad(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    if name in ("empty.mp4", "text.mp4", "sound.txt"):
        path.write_text("" if name == "empty.mp4" else "no video at all\n" * 20)
    elif name == "one.png":
        Image.fromarray(moving(1)[0]).save(path)
    elif name == "nothing":
        path.mkdir()
    elif name in ("sizes", "torn", "both"):
        write_frames(path, moving(2))
        if name == "sizes":
            Image.fromarray(moving(1, 10, 12)[0]).save(path / "f2.png")
        elif name == "torn":
            (path / "f1.png").write_bytes(b"torn")
        else:
            write_video(path / "a.avi", moving(2))
    elif name == "cut.mp4":
        whole = write_video(tmp_path / "whole.mp4", moving(20)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    return path


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone.mp4", ConfigError, "does not exist"),
        ("empty.mp4", ShardError, "an empty file"),
        ("text.mp4", ShardError, "to be a whole video"),
        ("cut.mp4", ShardError, "to be a whole video"),
        ("sound.txt", ConfigError, "is none of them"),
        ("one.png", ConfigError, "Name the folder"),
        ("nothing", ConfigError, "but got nothing"),
        ("sizes", ShardError, r"size.*f2.png"),
        ("torn", ShardError, "f1.png"),
        ("both", ConfigError, "one kind of input"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    path = str(bad(tmp_path, name))
    with pytest.raises(error, match=message) as caught:
        [list(video.frames()) for video in find_videos([path])]
    assert "--on-bad-sample" not in str(caught.value)
