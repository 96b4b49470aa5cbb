import gzip
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssync_pl.data.check import CheckReport, check_shards, group_shards, render_report
from ssync_pl.data.index import load_shards, read_index
from ssync_pl.data.shards import ShardWriter
from ssync_pl.data.video import encode_mp4
from ssync_pl.errors import ConfigError, MissingShardError


def noise(seed: int, frames: int = 4, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def ids(*present: int, frames: int = 4) -> np.ndarray:
    masks = np.zeros((frames, 8, 8, 1), np.uint8)
    for column, ident in enumerate(present):
        masks[:, :, column] = ident
    return masks


def found(report: CheckReport) -> list[tuple[str, str | None]]:
    return [(problem.kind, problem.key) for problem in report.problems]


def write(folder: Path, prefix: str, samples: dict[str, dict], per_shard: int = 32) -> list[str]:
    with ShardWriter(folder, prefix, per_shard) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return [str(path) for path in sorted(folder.glob(f"{prefix}-*.tar"))]


@pytest.fixture
def clean(tmp_path: Path) -> list[str]:
    samples = {
        str(n): {
            "video.npy": noise(n, frames=3 + n % 3),
            "segmentations.npy.gz": ids(*range(1, n + 1), frames=3 + n % 3),
        }
        for n in range(1, 6)
    }
    return write(tmp_path, "train", samples, per_shard=2)


def test_a_clean_set_is_counted(clean: list[str]) -> None:
    report = check_shards(clean)
    assert report.clean
    (item,) = report.sets
    assert (item.name, item.shards, item.videos, item.frames) == ("train", 3, 5, 4 + 5 + 3 + 4 + 5)
    assert item.bytes == sum(os.path.getsize(path) for path in clean)
    assert item.frame_sizes == {"8x8": 5}
    assert item.frames_a_video == (3, 4.0, 5)
    assert item.objects_a_video == (1, 3.0, 5)
    assert item.mask_format == "ids"
    assert item.members == {"segmentations.npy.gz": 5, "video.npy": 5}
    assert item.without_masks == 0


def test_quick_reads_the_same_but_counts_no_ids(clean: list[str]) -> None:
    deep, quick = check_shards(clean).sets[0], check_shards(clean, deep=False).sets[0]
    assert quick.objects_a_video is None
    assert (quick.frames, quick.frame_sizes, quick.members) == (deep.frames, deep.frame_sizes, deep.members)
    assert "not counted" in render_report(check_shards(clean, deep=False))


def test_channels_and_videos_without_masks(tmp_path: Path) -> None:
    masks = np.zeros((4, 8, 8, 3), np.uint8)
    masks[..., 0], masks[:, 2, 2, 2] = 7, 40  # the second channel is empty; values are categories
    one = np.full((4, 8, 8, 1), 9, np.uint8)
    samples = {
        "a": {"video.npy": noise(1), "segmentations.npy": masks},
        "b": {"video.npy": noise(2), "segmentations.npy": one},
        "c": {"video.npy": noise(3)},
    }
    (item,) = check_shards(write(tmp_path, "yt", samples)).sets
    assert (item.mask_format, item.objects_a_video, item.without_masks) == ("channels", (1, 1.5, 2), 1)


def test_two_processes_give_the_same_report(clean: list[str]) -> None:
    Path(clean[1]).write_bytes(Path(clean[1]).read_bytes()[:2000])
    assert check_shards(clean, num_workers=2) == check_shards(clean, num_workers=0)


def test_a_truncated_shard_is_named_and_the_rest_is_counted(clean: list[str]) -> None:
    whole = load_shards(clean)
    (start, size) = whole[1].samples[1].members["video.npy"]
    Path(clean[1]).write_bytes(Path(clean[1]).read_bytes()[: start + size // 2])
    report = check_shards(clean)
    assert found(report) == [("shard", None)]
    assert all(problem.shard == clean[1] for problem in report.problems)
    assert report.sets[0].frames == 4 + 5 + 3 + 5  # the fourth video is lost, the third of its shard is not


def test_a_cut_between_two_members_is_seen(clean: list[str]) -> None:
    entry = load_shards(clean[:1])[0]
    first_of_second = min(start for start, _ in entry.samples[1].members.values())
    Path(clean[0]).write_bytes(Path(clean[0]).read_bytes()[: first_of_second - 512])
    report = check_shards(clean)
    assert found(report) == [("shard", None)]
    assert report.sets[0].videos == 4


def test_empty_files_folders_of_text_and_gzip_are_damaged_shards(tmp_path: Path, clean: list[str]) -> None:
    empty, text, packed = (tmp_path / f"bad-{n}.tar" for n in range(3))
    empty.write_bytes(b"")
    text.write_text("no tar" * 200)
    packed.write_bytes(gzip.compress(Path(clean[0]).read_bytes()))
    report = check_shards({"bad": [str(empty), str(text), str(packed)], "train": clean})
    assert [problem.shard for problem in report.problems if problem.kind == "shard"] == [
        str(empty),
        str(text),
        str(packed),
    ]
    assert report.sets[1].videos == 5


def test_a_shard_without_samples(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    path = write_tar({"README": b"nothing"})
    report = check_shards([str(path)])
    assert found(report) == [("shard", None)]
    assert "at least one sample" in report.problems[0].message


def test_compressed_shards_are_streamed(tmp_path: Path, clean: list[str]) -> None:
    packed = tmp_path / "packed" / "train-000000.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(Path(clean[0]).read_bytes()))
    report = check_shards([str(packed)])
    assert report.clean
    assert report.sets[0].videos == 2
    packed.write_bytes(packed.read_bytes()[:-200])
    assert found(check_shards([str(packed)]))[-1] == ("shard", None)


def test_a_missing_file_is_a_problem(tmp_path: Path, clean: list[str]) -> None:
    report = check_shards([*clean, str(tmp_path / "train-000009.tar")])
    assert found(report) == [("shard", None)]
    assert report.sets[0].videos == 5


def damaged(kind: str, npy: Callable[[np.ndarray], bytes]) -> dict[str, bytes]:
    video, masks = npy(noise(1)), npy(ids(1, 2))
    picture = io.BytesIO()
    Image.fromarray(noise(3)[0]).save(picture, format="JPEG")
    return {
        "npy header": {"video.npy": b"\x00" * 400},
        "npy half": {"video.npy": video[:-100]},
        "gz half": {"video.npy": video, "segmentations.npy.gz": gzip.compress(masks)[:-12]},
        "gz none": {"video.npy": video, "segmentations.npy.gz": masks},
        "jpg": {"image.jpg": picture.getvalue()[:60]},
        "json": {"video.npy": video, "info.json": b"{"},
    }[kind]


@pytest.mark.parametrize("kind", ["npy header", "npy half", "gz half", "gz none", "jpg", "json"])
def test_damaged_members_are_named(
    kind: str, write_tar: Callable[..., Path], npy_bytes: Callable[[np.ndarray], bytes]
) -> None:
    good = npy_bytes(noise(9))
    bad = {f"7.{name}": data for name, data in damaged(kind, npy_bytes).items()}
    report = check_shards([str(write_tar({"6.video.npy": good, **bad, "8.video.npy": npy_bytes(noise(10))}))])
    assert found(report) == [("member", "7")]
    assert "key 7" in report.problems[0].message
    assert report.sets[0].videos == 3


def test_a_damaged_mp4_is_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = encode_mp4(noise(1, frames=6, size=(32, 32)))
    whole, cut = write(tmp_path, "v", {"0": {"video.mp4": clip}, "1": {"video.mp4": clip[:-40]}}, 1)
    report = check_shards([whole])
    assert report.clean
    assert report.sets[0].frame_sizes == {"32x32": 1}
    assert report.sets[0].frames == 6
    assert found(check_shards([cut])) == [("member", "1")]
    hole = bytearray(clip)
    start = clip.index(b"mdat") + 8
    hole[start + 800 : start + 2000] = b"\xff" * 1200  # behind the encoder's note on itself
    (path,) = write(tmp_path, "h", {"2": {"video.mp4": bytes(hole)}})
    assert ("member", "2") in found(check_shards([path]))


@pytest.mark.parametrize("name", ["meta.pkl", "meta.pth", "meta.pyd", "video.pickle"])
def test_members_that_execute_code_are_refused(
    name: str, write_tar: Callable[..., Path], npy_bytes: Callable[[np.ndarray], bytes]
) -> None:
    path = write_tar({"7.video.npy": npy_bytes(noise(1)), f"7.{name}": b"\x80\x04N."})
    report = check_shards([str(path)])
    assert found(report) == [("refused", "7")]
    assert "can execute code" in report.problems[0].message


@pytest.mark.parametrize("name", ["meta.npy", "video.npy"])
def test_object_arrays_are_refused(name: str, write_tar: Callable[..., Path]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    video = io.BytesIO()
    np.save(video, noise(1))
    members = {"7.video.npy": video.getvalue(), f"7.{name}": buffer.getvalue()}
    report = check_shards([str(write_tar(members))])
    assert found(report) == [("refused", "7")]


def test_members_that_nobody_reads_are_only_a_note(
    write_tar: Callable[..., Path], npy_bytes: Callable[[np.ndarray], bytes]
) -> None:
    report = check_shards([str(write_tar({"7.video.npy": npy_bytes(noise(1)), "7.caption.txt": b"a ball"}))])
    assert report.clean
    assert any("never read: caption.txt (1)" in note for note in report.notes)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"video.npy": noise(1), "segmentations.npy.gz": ids(1, frames=3)},
            "as many frames as the video, 4, but got 3",
        ),
        ({"video.npy": noise(1).astype(np.float32)}, "uint8 frames .* dtype float32"),
        ({"video.npy": noise(1)[..., :1]}, r"uint8 frames .* \(4, 8, 8, 1\)"),
        ({"video.npy": noise(1), "segmentations.npy": ids(1).astype(np.float32)}, "integer masks"),
        (
            {"video.npy": noise(1), "segmentations.npy": np.zeros((4, 8, 16, 1), np.uint8)},
            "proportions 8x8, but got 8x16",
        ),
        ({"video.npy": noise(1), "times.npy": np.zeros(4, "datetime64[s]")}, "numbers, but got datetime64"),
        ({"segmentations.npy": ids(1)}, "one of the members video.npy"),
    ],
)
def test_samples_that_loaders_refuse(tmp_path: Path, members: dict, message: str, deep: bool) -> None:
    (path,) = write(tmp_path, "train", {"3": members, "4": {"video.npy": noise(2)}})
    report = check_shards([path], deep=deep)
    assert found(report) == [("sample", "3")]
    assert re.search(message, report.problems[0].message)


def test_negative_ids_and_too_many_objects(tmp_path: Path) -> None:
    samples = {
        "0": {"video.npy": noise(1), "segmentations.npy": ids(1).astype(np.int16) - 1},
        "1": {"video.npy": noise(2), "segmentations.npy": ids(2, 9)},
        "2": {"video.npy": noise(3), "segmentations.npy": ids(1, 2)},
    }
    (path,) = write(tmp_path, "train", samples)
    report = check_shards([path], max_objects=5)
    assert found(report) == [("sample", "0"), ("sample", "1")]
    assert "at most 5 objects" in report.problems[1].message


def test_pictures_are_sets_of_one_frame(tmp_path: Path) -> None:
    masks = np.zeros((8, 8, 2), np.uint8)
    masks[0] = 1
    (path,) = write(tmp_path, "coco", {"5": {"image.npy": noise(1)[0], "segmentations.npy": masks}})
    report = check_shards([path])
    assert report.clean
    assert (report.sets[0].frames, report.sets[0].mask_format, report.sets[0].objects_a_video) == (
        1,
        "channels",
        (2, 2.0, 2),
    )


def test_duplicate_keys_in_and_across_shards(
    tmp_path: Path, write_tar: Callable[..., Path], npy_bytes: Callable[[np.ndarray], bytes]
) -> None:
    video = [npy_bytes(noise(n)) for n in range(4)]
    # key 1 comes again behind key 2
    first = write_tar({"1.video.npy": video[0], "2.video.npy": video[1], "1.image.npy": video[2]}, "a-000000.tar")
    second = write_tar({"2.video.npy": video[3]}, "a-000001.tar")
    report = check_shards([str(first), str(second)])
    assert [(p.kind, p.key, p.shard) for p in report.problems if p.kind == "key"] == [
        ("key", "1", str(first)),
        ("key", "2", str(second)),
    ]
    apart = check_shards({"a": [str(first)], "b": [str(second)]})
    assert [p.key for p in apart.problems if p.kind == "key"] == ["1"]


def test_a_member_twice_is_a_damaged_shard(tmp_path: Path, npy_bytes: Callable[[np.ndarray], bytes]) -> None:
    path = tmp_path / "a-000000.tar"
    with tarfile.open(path, "w") as tar:
        for seed in (1, 2):
            info = tarfile.TarInfo("1.video.npy")
            data = npy_bytes(noise(seed))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = check_shards([str(path)])
    assert ("shard", None) in found(report)
    assert "holds `video.npy` twice" in report.problems[0].message


def test_a_leak_between_training_and_validation(tmp_path: Path) -> None:
    train = write(tmp_path, "train", {str(n): {"video.npy": noise(n)} for n in range(4)})
    # the same frames under another key and packed
    validation = write(tmp_path, "validation", {"0": {"video.npy": noise(7)}, "1": {"video.npy.gz": noise(2)}})
    report = check_shards({"train": train, "validation": validation})
    assert [(p.kind, p.shard, p.key) for p in report.problems] == [("content", validation[0], "1")]
    message = report.problems[0].message
    assert f"those of {train[0]}, key 2" in message
    assert "another set (train, here validation)" in message
    assert check_shards({"train": train, "validation": validation}, deep=False).clean


def test_one_shard_in_two_sets_is_a_leak(clean: list[str]) -> None:
    report = check_shards({"train": clean, "validation": clean[:1]})
    assert [(p.kind, p.shard) for p in report.problems] == [("content", clean[0])]
    assert report.sets[1].videos == 0


def test_shards_that_share_a_name(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "train", {"0": {"video.npy": noise(1)}})
    two = write(tmp_path / "b", "train", {"1": {"video.npy": noise(2)}})
    report = check_shards([*one, *two])
    assert found(report) == [("name", None)]
    apart = check_shards({"train": one, "validation": two})
    assert apart.clean


@pytest.mark.parametrize("trouble", ["size", "frames", "gone", "absent"])
def test_an_index_that_does_not_fit(tmp_path: Path, clean: list[str], trouble: str) -> None:
    path = tmp_path / "index.json"
    content = json.loads(path.read_text())
    if trouble == "size":
        content["shards"][0]["size"] += 512
    if trouble == "frames":
        content["shards"][1]["samples"][0]["frames"] = 99
    if trouble == "gone":
        content["shards"].append({**content["shards"][0], "name": "train-000077.tar"})
    path.write_text(json.dumps(content))
    if trouble == "absent":
        path.unlink()
    report = check_shards(clean)
    if trouble in ("gone", "absent"):
        assert report.clean
        assert any("index.json" in note for note in report.notes)
    else:
        assert found(report) == [("index", None)]
        assert report.problems[0].shard == str(path)
    again = check_shards(clean, rebuild_index=True)
    assert again.clean
    assert check_shards(clean).clean
    index = read_index(tmp_path)
    assert index is not None
    assert sorted(index.shards) == [Path(shard).name for shard in clean]


def test_rebuilding_leaves_damaged_shards_out_and_keeps_the_recipe(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", 1, recipe={"seed": 3}) as writer:
        for n in range(2):
            writer.write(str(n), {"video.npy": noise(n)})
    other = write(tmp_path, "validation", {"0": {"video.npy": noise(5)}})
    train = sorted(str(path) for path in tmp_path.glob("train-*.tar"))
    Path(train[0]).write_bytes(b"")
    check_shards(train, rebuild_index=True)
    index = read_index(tmp_path)
    assert index is not None
    assert sorted(index.shards) == ["train-000001.tar", Path(other[0]).name]
    assert index.recipe == {"seed": 3}


def test_remote_shards_are_streamed(tmp_path: Path, clean: list[str], served: str) -> None:
    urls = [f"{served}/{Path(path).name}" for path in clean]
    local, remote = check_shards(clean), check_shards(urls, num_workers=0)
    assert remote.clean
    for name in ("videos", "frames", "frame_sizes", "objects_a_video", "mask_format"):
        assert getattr(remote.sets[0], name) == getattr(local.sets[0], name)
    start, size = load_shards(clean)[1].samples[1].members["video.npy"]
    Path(clean[1]).write_bytes(Path(clean[1]).read_bytes()[: start + size // 2])
    report = check_shards(urls, num_workers=0)
    assert ("shard", None) in found(report)
    assert {problem.shard for problem in report.problems} == {urls[1]}
    missing = check_shards([urls[0], f"{served}/train-000044.tar"], num_workers=0)
    assert [problem.shard for problem in missing.problems] == [f"{served}/train-000044.tar"]


def test_remote_shards_and_their_index(tmp_path: Path, clean: list[str], served: str) -> None:
    urls = [f"{served}/{Path(path).name}" for path in clean]
    content = json.loads((tmp_path / "index.json").read_text())
    content["shards"][0]["samples"][0]["key"] = "other"
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert found(check_shards(urls, num_workers=0)) == [("index", None)]
    (tmp_path / "index.json").unlink()
    report = check_shards([f"{url}?token=secret" for url in urls], num_workers=0)
    assert report.clean
    assert any("only one process" in note for note in report.notes)
    assert "secret" not in json.dumps(report.to_json())


def test_sets_are_told_apart_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train-000000", "train-000001", "validation-000000"):
        shutil.copy(write(tmp_path / name, "x", {"0": {"video.npy": noise(1)}})[0], tmp_path / f"{name}.tar")
    monkeypatch.chdir(tmp_path)
    sets, problems = group_shards(["*.tar"])
    assert sets == {"train": ["train-000000.tar", "train-000001.tar"], "validation": ["validation-000000.tar"]}
    assert problems == []
    literal, _ = group_shards(["train-000000.tar", "train-000001.tar"])
    assert literal == {"train": ["train-000000.tar", "train-000001.tar"]}
    sets, problems = group_shards(["train-{000000..000003}.tar"])
    assert len(sets["train"]) == 2
    assert [problem.shard for problem in problems] == ["train-000002.tar", "train-000003.tar"]
    with pytest.raises(MissingShardError, match="train-000007"):
        group_shards(["train-{000007..000009}.tar"])


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least one shard"):
        check_shards([])
    with pytest.raises(ConfigError, match="list of"):
        check_shards("a.tar")
    with pytest.raises(ConfigError, match="`num_workers` to be at least 0"):
        check_shards(["a.tar"], num_workers=-1)
    with pytest.raises(ConfigError, match="`max_objects` to be at least 1"):
        check_shards(["a.tar"], max_objects=0)


def test_long_lists_are_cut_in_the_text_only(tmp_path: Path) -> None:
    (path,) = write(tmp_path, "train", {f"{n:02d}": {"video.npy": noise(1)} for n in range(9)})
    report = check_shards([path])
    text = render_report(report, most=3)
    assert "duplicate videos (8)" in text
    assert "… and 5 more" in text
    assert len(report.to_json()["problems"]) == 8
    assert text.splitlines()[-1].startswith("8 problems found: 1 set, 9 videos")
