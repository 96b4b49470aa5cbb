"""`data check`: counts, damage, duplicates, leaks and indices that do not fit."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_decode import video_bytes

from ssync_pl.data.check import CheckReport, check_shards, group_shards, render_report
from ssync_pl.data.index import load_shards
from ssync_pl.data.shards import ShardWriter, encode_member
from ssync_pl.errors import ConfigError, MissingShardError


def noise(seed: int, frames: int = 4, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def ids(*present: int, frames: int = 4) -> np.ndarray:
    masks = np.zeros((frames, 8, 8, 1), np.uint8)
    for column, ident in enumerate(present):
        masks[:, :, column] = ident
    return masks


def check(*paths: object, **options) -> CheckReport:
    return check_shards({"train": [str(path) for path in paths]}, **options)


def found(report: CheckReport) -> list[tuple[str, str | None]]:
    return [(problem.kind, problem.key) for problem in report.problems]


def write(folder: Path, prefix: str, samples: dict[str, dict], per_shard: int = 32) -> list[str]:
    with ShardWriter(folder, prefix, per_shard) as writer:
        for key, members in samples.items():
            writer.write(key, members)
    return [str(path) for path in sorted(folder.glob(f"{prefix}-*.tar"))]


@pytest.fixture
def clean(tmp_path: Path) -> list[str]:
    frames = {n: 3 + n % 3 for n in range(1, 6)}
    samples = {
        str(n): {"video.npy": noise(n, count), "segmentations.npy.gz": ids(*range(1, n + 1), frames=count)}
        for n, count in frames.items()
    }
    return write(tmp_path, "train", samples, per_shard=2)


def test_a_clean_set_is_counted(clean, tmp_path, served):
    report = check(*clean)
    assert report.clean
    (item,) = report.sets
    assert (item.name, item.shards, item.videos, item.frames) == ("train", 3, 5, 4 + 5 + 3 + 4 + 5)
    assert item.bytes == sum(os.path.getsize(path) for path in clean)
    assert (item.frame_sizes, item.frames_a_video, item.objects_a_video) == ({"8x8": 5}, (3, 4.0, 5), (1, 3.0, 5))
    assert (item.mask_format, item.without_masks) == ("ids", 0)
    assert item.members == {"segmentations.npy.gz": 5, "video.npy": 5}
    packed = tmp_path / "packed" / "train-000000.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(Path(clean[0]).read_bytes()))
    assert check(packed).sets[0].videos == 2
    remote = check(*(f"{served}/{Path(path).name}" for path in clean), num_workers=0)
    assert remote.clean
    for name in ("videos", "frames", "frame_sizes", "objects_a_video", "mask_format"):
        assert getattr(remote.sets[0], name) == getattr(item, name)
    quick = check(*clean, deep=False)
    assert quick.clean
    assert (quick.sets[0].videos, quick.sets[0].members) == (5, item.members)
    assert "--quick" in render_report(quick)


def test_channels_pictures_and_videos_without_masks(tmp_path):
    masks = np.zeros((4, 8, 8, 3), np.uint8)
    masks[..., 0], masks[:, 2, 2, 2] = 7, 40  # the second channel is empty; values are categories
    samples = {
        "a": {"video.npy": noise(1), "segmentations.npy": masks},
        "b": {"image.npy": noise(2)[0], "segmentations.npy": np.moveaxis(masks[0], -1, 0)},
        "c": {"video.npy": noise(3), "caption.json": "a ball"},
    }
    report = check(*write(tmp_path, "yt", samples))
    assert report.clean
    (item,) = report.sets
    assert (item.frames, item.mask_format, item.objects_a_video, item.without_masks) == (9, "channels", (2, 2.0, 2), 1)


def test_damaged_shards_are_named_and_the_rest_is_counted(clean, tmp_path, write_tar, served):
    start, size = load_shards(clean)[1].samples[1].members["video.npy"]
    Path(clean[1]).write_bytes(Path(clean[1]).read_bytes()[: start + size // 2])
    for urls in (clean, [f"{served}/{Path(path).name}" for path in clean]):
        report = check(*urls, num_workers=0)
        assert [(problem.kind, problem.shard) for problem in report.problems] == [("shard", urls[1])]
        assert report.sets[0].frames == 4 + 5 + 3 + 5  # the fourth video is lost, the third of its shard is not
    assert check(*clean[:2], num_workers=2) == check(*clean[:2], num_workers=0)
    whole = Path(clean[0]).read_bytes()
    contents = {"empty": b"", "text": b"no tar" * 200, "packed": gzip.compress(whole), "between": whole[:3584]}
    bad = [str(write_tar({"README": b"nothing"}, "none.tar")), str(tmp_path / "absent.tar")]
    for name, content in contents.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        bad.append(str(tmp_path / f"{name}.tar"))
    report = check_shards({"bad": bad, "train": clean[:1]})
    assert sorted({problem.shard for problem in report.problems if problem.kind == "shard"}) == sorted(bad)
    assert report.sets[1].videos == 2


VIDEO, MASKS = encode_member("video.npy", noise(1)), encode_member("masks.npy", ids(1, 2))
PICTURE = io.BytesIO()
Image.fromarray(noise(3)[0]).save(PICTURE, format="JPEG")


@pytest.mark.parametrize(
    "members",
    [
        {"video.npy": VIDEO, "segmentations.npy.gz": gzip.compress(MASKS)[:-12]},
        {"video.npy": VIDEO, "segmentations.npy.gz": MASKS},
        {"image.jpg": PICTURE.getvalue()[:60]},
        {"video.npy": VIDEO, "info.json": b"{"},
        *({"video.npy": VIDEO, f"meta.{kind}": b"\x80\x04N."} for kind in ("pkl", "pth", "pyd")),
    ],
)
def test_damaged_and_refused_members_are_named(members, write_tar):
    bad = {f"7.{name}": data for name, data in members.items()}
    good = [encode_member("video.npy", noise(seed)) for seed in (9, 10)]
    report = check(write_tar({"6.video.npy": good[0], **bad, "8.video.npy": good[1]}))
    assert found(report) == [("sample", "7")]
    assert "key 7" in report.problems[0].message
    assert report.sets[0].videos == 3


def test_a_damaged_mp4_is_named_and_members_that_nobody_reads_are_a_note(tmp_path, write_tar):
    clip = video_bytes(list(noise(1, frames=6, size=(32, 32))), "libx264")
    whole, cut = write(tmp_path, "v", {"0": {"video.mp4": clip}, "1": {"video.mp4": clip[:-40]}}, 1)
    assert check(whole).sets[0].frames == 6
    assert found(check(cut)) == [("sample", "1")]
    hole, start = bytearray(clip), clip.index(b"mdat") + 8
    hole[start + 800 : start + 2000] = b"\xff" * 1200  # behind the encoder's note on itself
    assert found(check(*write(tmp_path, "h", {"2": {"video.mp4": bytes(hole)}}))) == [("sample", "2")]
    report = check(write_tar({"7.video.npy": VIDEO, "7.caption.txt": b"a ball"}))
    assert report.clean
    assert any("never read: caption.txt (1)" in note for note in report.notes)


def test_duplicate_keys_and_videos_and_a_leak_between_training_and_validation(write_tar):
    video = [encode_member("video.npy", noise(n)) for n in range(4)]
    # key 1 comes again behind key 2
    members = {"1.video.npy": video[0], "2.video.npy": video[1], "1.video.npy.gz": gzip.compress(video[2])}
    first, second = str(write_tar(members, "a-000000.tar")), str(write_tar({"2.video.npy": video[3]}, "a-000001.tar"))
    report = check(first, second, second)
    assert [(p.kind, p.key, p.shard) for p in report.problems] == [("key", "1", first), ("key", "2", second)]
    # the same frames under another key and packed
    copied = str(write_tar({"0.video.npy": VIDEO[:-1] + b"x", "9.video.npy.gz": gzip.compress(video[3])}, "b.tar"))
    report = check_shards({"train": [second], "validation": [copied]})
    assert [(p.kind, p.shard, p.key) for p in report.problems] == [("content", copied, "9")]
    assert f"those of {second}, key 2, which is of another set" in report.problems[0].message
    assert found(check_shards({"train": [second], "validation": [second]})) == [("content", "2")]


@pytest.mark.parametrize("trouble", ["size", "frames", "gone", "absent", "foreign"])
def test_an_index_that_does_not_fit(tmp_path, clean, trouble):
    path = tmp_path / "index.json"
    content = json.loads(path.read_text())
    if trouble == "size":
        content["shards"][0]["size"] += 512
    if trouble == "frames":
        content["shards"][1]["samples"][0]["frames"] = 99
    if trouble == "gone":
        content["shards"].append({**content["shards"][0], "name": "train-000077.tar"})
    path.write_text("{}" if trouble == "foreign" else json.dumps(content))
    if trouble == "absent":
        path.unlink()
    report = check(*clean)
    assert found(report) == ([("index", None)] if trouble in ("size", "frames") else [])
    assert any("index.json" in note for note in report.notes) == (trouble in ("absent", "foreign"))


def test_remote_shards_and_their_index(tmp_path, clean, served):
    urls = [f"{served}/{Path(path).name}" for path in clean]
    content = json.loads((tmp_path / "index.json").read_text())
    content["shards"][0]["samples"][0]["key"] = "other"
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert found(check(*urls, num_workers=0)) == [("index", None)]
    (tmp_path / "index.json").unlink()
    report = check(*(f"{url}?token=secret" for url in [*urls, f"{served}/train-000044.tar"]), num_workers=0)
    assert [(problem.kind, problem.shard.split("?")[0]) for problem in report.problems] == [
        ("shard", f"{served}/train-000044.tar")
    ]
    assert any("only one process" in note for note in report.notes)
    assert "secret" not in json.dumps(report.to_json())


def test_sets_are_told_apart_by_name(tmp_path, monkeypatch):
    for name in ("train-000000", "train-000001", "validation-000000"):
        shutil.copy(write(tmp_path / name, "x", {"0": {"video.npy": noise(1)}})[0], tmp_path / f"{name}.tar")
    monkeypatch.chdir(tmp_path)
    train = ["train-000000.tar", "train-000001.tar"]
    assert group_shards(["*.tar"]) == ({"train": train, "validation": ["validation-000000.tar"]}, [])
    assert group_shards(train) == ({"train": train}, [])
    sets, problems = group_shards(["train-{000000..000003}.tar"])
    assert sets["train"] == train
    assert [problem.shard for problem in problems] == ["train-000002.tar", "train-000003.tar"]
    with pytest.raises(MissingShardError, match="train-000007"):
        group_shards(["train-{000007..000009}.tar"])
    assert set(group_shards([train[0], "train-000001/*.tar", "train-000000/*.tar"])[0]) == {
        "train", "x (train-000001)", "x (train-000000)",
    }  # fmt: skip


def test_settings_are_checked_and_long_lists_are_cut_in_the_text_only(tmp_path):
    for settings, word in (({"sets": {}}, "sets"), ({"sets": {"a": ["a"]}, "num_workers": -1}, "num_workers")):
        with pytest.raises(ConfigError, match=word):
            check_shards(**settings)
    report = check(*write(tmp_path, "train", {f"{n:02d}": {"video.npy": noise(1)} for n in range(9)}))
    text = render_report(report, most=3)
    assert "duplicate videos (8)" in text
    assert "… and 5 more" in text
    assert len(report.to_json()["problems"]) == 8
    assert text.splitlines()[-1].startswith("8 problems found: 1 set, 9 videos")
