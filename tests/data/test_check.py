import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_decode import video_bytes

from ssync_pl.cli import main
from ssync_pl.data.check import CheckReport, check_shards, group_shards, render_report
from ssync_pl.data.index import load_shards
from ssync_pl.data.shards import ShardWriter, encode_member


def noise(seed: int, frames: int = 4, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def ids(*present: int, frames: int = 4) -> np.ndarray:
    masks = np.zeros((frames, 8, 8, 1), np.uint8)
    masks[:, :, : len(present), 0] = present
    return masks


def check(*paths: object, **options) -> CheckReport:
    return check_shards({"train": [str(path) for path in paths]}, **{"num_workers": 0, **options})


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
    (facts,) = report.sets
    assert facts.pop("bytes") > 5 * 3 * 8 * 8 * 3
    assert facts == {
        "name": "train", "shards": 3, "videos": 5, "frames": 4 + 5 + 3 + 4 + 5, "frames_per_video": [3, 5],
        "frame_sizes": {"8x8": 5}, "mask_format": "ids", "objects_per_video": [1, 5],
        "members": {"segmentations.npy.gz": 5, "video.npy": 5},
    }  # fmt: skip
    packed = tmp_path / "packed-000000.tar.gz"
    packed.write_bytes(gzip.compress(Path(clean[0]).read_bytes()))
    assert check(packed).sets[0]["videos"] == 2
    remote = check(*(f"{served}/{Path(path).name}" for path in clean))
    assert remote.clean
    assert {**facts, "bytes": remote.sets[0]["bytes"]} == remote.sets[0]


def test_channels_pictures_and_members_that_nobody_reads(tmp_path, write_tar):
    masks = np.zeros((4, 8, 8, 3), np.uint8)
    masks[..., 0], masks[:, 2, 2, 2] = 7, 40  # the second channel is empty; values are categories
    samples = {
        "a": {"video.npy": noise(1), "segmentations.npy": masks},
        "b": {"image.npy": noise(2)[0], "segmentations.npy": np.moveaxis(masks[0], -1, 0)},
        "c": {"video.npy": noise(3), "caption.json": "a ball"},
    }
    report = check(*write(tmp_path, "yt", samples), write_tar({"7.video.npy": VIDEO + b"", "7.caption.txt": b"a ball"}))
    assert found(report) == [("content", "7")]
    (facts,) = report.sets
    assert (facts["frames"], facts["mask_format"], facts["objects_per_video"]) == (13, "channels", [2, 2])
    assert facts["members"]["caption.txt"] == 1


def test_damaged_shards_are_named_and_the_rest_is_counted(clean, tmp_path, write_tar, served):
    start, size = load_shards(clean)[1].samples[1].members["video.npy"]
    Path(clean[1]).write_bytes(Path(clean[1]).read_bytes()[: start + size // 2])
    for urls in (clean, [f"{served}/{Path(path).name}" for path in clean]):
        report = check(*urls)
        assert [(problem.kind, problem.shard) for problem in report.problems] == [("shard", urls[1])]
        assert report.sets[0]["frames"] == 4 + 5 + 3 + 5  # the fourth video is lost, the third of its shard is not
    assert check(*clean[:2], num_workers=2) == check(*clean[:2])
    whole = Path(clean[0]).read_bytes()
    contents = {"empty": b"", "text": b"no tar" * 200, "packed": gzip.compress(whole), "between": whole[:3584]}
    bad = [str(write_tar({"README": b"nothing"}, "none.tar")), str(tmp_path / "absent.tar")]
    for name, content in contents.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        bad.append(str(tmp_path / f"{name}.tar"))
    report = check_shards({"bad": bad, "train": clean[:1]})
    assert sorted({problem.shard for problem in report.problems if problem.kind == "shard"}) == sorted(bad)
    assert report.sets[1]["videos"] == 2
    report = check(f"{served}/train-000044.tar?token=secret")
    assert found(report) == [("shard", None)]
    assert "secret" not in str(report)


VIDEO, MASKS = encode_member("video.npy", noise(1)), encode_member("masks.npy", ids(1, 2))
PICTURE = io.BytesIO()
Image.fromarray(noise(3)[0]).save(PICTURE, format="JPEG")
CLIP = video_bytes(list(noise(1, frames=6, size=(32, 32))), "libx264")
HOLE = CLIP.index(b"mdat") + 808  # behind the encoder's note on itself


@pytest.mark.parametrize(
    "members",
    [
        {"video.npy": VIDEO, "segmentations.npy.gz": gzip.compress(MASKS)[:-12]},
        {"video.npy": VIDEO, "segmentations.npy.gz": MASKS},
        {"image.jpg": PICTURE.getvalue()[:60]},
        {"video.npy": VIDEO, "info.json": b"{"},
        {"video.mp4": CLIP[:-150]},
        {"video.mp4": CLIP[:HOLE] + b"\xff" * 1200 + CLIP[HOLE + 1200 :]},
        *({"video.npy": VIDEO, f"meta.{kind}": b"\x80\x04N."} for kind in ("pkl", "pth", "pyd")),
    ],
)
def test_damaged_and_refused_members_are_named(members, write_tar):
    bad = {f"7.{name}": data for name, data in members.items()}
    good = [encode_member("video.npy", noise(seed)) for seed in (9, 10)]
    report = check(write_tar({"6.video.npy": good[0], **bad, "8.video.npy": good[1], "9.video.mp4": CLIP}))
    assert found(report) == [("sample", "7")]
    assert "key 7" in report.problems[0].message
    assert (report.sets[0]["videos"], report.sets[0]["frames"]) == (4, 4 + 4 + 6)


def test_duplicate_keys_and_videos_and_a_leak_between_training_and_validation(write_tar, tmp_path):
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
    many = check(*write(tmp_path, "many", {f"{n:02d}": {"video.npy": noise(1)} for n in range(9)}))
    assert "duplicate videos (8)" in render_report(many)


def test_sets_are_told_apart_by_name(tmp_path, monkeypatch):
    for name in ("train-000000", "train-000001", "validation-000000"):
        shutil.copy(write(tmp_path / name, "x", {"0": {"video.npy": noise(1)}})[0], tmp_path / f"{name}.tar")
    monkeypatch.chdir(tmp_path)
    train = ["train-000000.tar", "train-000001.tar"]
    assert group_shards(["*.tar"]) == {"train": train, "validation": ["validation-000000.tar"]}
    assert group_shards(train) == {"train": train}
    several = group_shards([train[0], "train-000001/*.tar", "train-000000/*.tar"])
    assert list(several) == ["train", "train-000001/x", "train-000000/x"]


def test_the_command_says_clean_or_lists_problems(tmp_path, capsys):
    for prefix, seeds in (("train", range(3)), ("validation", range(3, 5))):
        write(tmp_path, prefix, {str(seed): {"video.npy": noise(seed)} for seed in seeds}, 2)
    facts, mine = tmp_path / "facts.json", tmp_path / "mine.json"
    mine.write_text("{}")
    for _ in range(2):  # an earlier report is replaced, a file of others never
        assert main(["data", "check", str(tmp_path / "*.tar"), "--json", str(facts)]) == 0
    content = json.loads(facts.read_text())
    assert (content["clean"], content["problems"], len(content["sets"])) == (True, [], 2)
    assert main(["data", "check", str(tmp_path / "*.tar"), "--json", str(mine)]) == 2
    assert mine.read_text() == "{}"
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "*.tar")]) == 0
    text = capsys.readouterr().out.splitlines()
    assert (text[0], text[-1]) == (f"{tmp_path}/train", "clean (videos read: 5)")
    assert "  frames_per_video   4" in text
    shutil.copy(tmp_path / "train-000000.tar", tmp_path / "test-000000.tar")
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert main(["data", "check", str(tmp_path / "t*.tar"), "--workers", "0"]) == 1
    text = capsys.readouterr().out
    assert "damaged shards (1)" in text
    assert "duplicate videos (2)" in text
    for words, message in ((["none.tar"], "none.tar"), ([str(shard), "--workers", "-2"], "`num_workers`")):
        assert main(["data", "check", *words]) == 2
        assert message in capsys.readouterr().err
