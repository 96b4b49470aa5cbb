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
    write_video(clips / "b9.avi", video)
    write_frames(clips / "c", video[:3])
    (clips / "c_masks").mkdir()
    (clips / "notes.txt").write_text("")
    write_shard(tmp_path / "shards", video[:2], video[:3])
    write_shard(tmp_path / "shards", video[:1], prefix="more")
    found = find_videos([str(clips), str(tmp_path / "shards" / "{clips,more}-*.tar"), str(clips / "c")])
    assert [item.key for item in found] == ["b9", "b10", "c", "0", "1", "0", "c"]
    assert [sum(1 for _ in item.frames()) for item in found] == [4, 4, 3, 2, 3, 1, 3]
    assert found[1].rate == 10
    assert np.array_equal(np.stack(list(found[2].frames())), video[:3])
    assert np.array_equal(np.stack(list(found[3].frames())), video[:2])
    assert [item.key for item in find_videos([str(clips / "*.mp4")])] == ["b10"]


def test_a_gif_is_a_video(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in moving(3)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=200)
    (video,) = find_videos([str(tmp_path / "a.gif")])
    assert (video.total, video.rate) == (3, 5.0)
    assert len(list(video.frames())) == 3


def test_a_folder_with_brackets_in_its_name(tmp_path: Path) -> None:
    write_frames(tmp_path / "a[1]", moving(2))
    assert find_videos([str(tmp_path / "a[1]")])[0].key == "a[1]"


def bad(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    if name == "empty.mp4":
        path.write_bytes(b"")
    elif name == "text.mp4":
        path.write_text("no video at all\n" * 20)
    elif name == "sound.txt":
        path.write_text("x")
    elif name == "one.png":
        Image.fromarray(moving(1)[0]).save(path)
    elif name == "nothing":
        path.mkdir()
    elif name == "sizes":
        write_frames(path, moving(2))
        Image.fromarray(moving(1, 10, 12)[0]).save(path / "f2.png")
    elif name == "torn":
        write_frames(path, moving(2))
        (path / "f1.png").write_bytes(b"torn")
    elif name == "both":
        write_frames(path, moving(2))
        write_video(path / "a.avi", moving(2))
    elif name == "cut.mp4":
        whole = write_video(tmp_path / "whole.mp4", moving(20)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    return path


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone.mp4", ConfigError, "does not exist"),
        ("*.mkv", ConfigError, "matches nothing"),
        ("empty.mp4", ShardError, "an empty file"),
        ("text.mp4", ShardError, "to be a video that can be read"),
        ("cut.mp4", ShardError, "to be a video that can be read"),
        ("sound.txt", ConfigError, "is none of them"),
        ("one.png", ConfigError, "Name the folder"),
        ("nothing", ConfigError, "but got nothing"),
        ("sizes", ShardError, r"f0.png has .* and f2.png"),
        ("torn", ShardError, "f1.png to be a picture"),
        ("both", ConfigError, "one kind of input"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        find_videos([str(bad(tmp_path, name))])
    assert "--on-bad-sample" not in str(caught.value)


def test_remote_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="Download it"):
        find_videos(["https://host/a.mp4"])
