"""Damaged files of every kind: they are read or refused with an error of ours, and nothing else happens."""

import contextlib
import io
import json
import random
import resource
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from folder_sets import davis_set, encode_file, own_set, smooth_video, write_movi, ytvis_set
from PIL import Image

from ssync_pl.cli import main
from ssync_pl.compare.results import load_comparison
from ssync_pl.data import ShardDataModule, ShardWriter
from ssync_pl.data.decode import decode_member
from ssync_pl.data.shards import encode_member
from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.tools.official.checkpoints import read_checkpoint
from ssync_pl.tools.predict.inputs import find_videos
from tiny_run import write_tiny

pytest.importorskip("av")
VIDEO = smooth_video(6, 16, 16)
WORDS = [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b"{", b"null", b"-1", b"1e999", b"9" * 400, b'"', b"'"]
WORDS += [b"!!python/object:os.system", b"${a}", b"&a", b"*a", b": ", b"\t", b"../", b"/etc/passwd", b"\xed\xa0\x80"]
WORDS += [b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"7777777777\0", b"(4, 8, 8, 3)", b"[1, 2]", b"{}"]
VALUES = [None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "../x", "=1+1", "\ud800", [], {}, [None]]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, changed, repeated, or with something put into them; JSON also with values of other types."""
    if data[:1] == b"{" and rng.random() < 0.6:
        content = json.loads(data)
        inside: Any = content
        while isinstance(inside, dict | list) and inside:
            holder, key = inside, rng.choice([*inside] if isinstance(inside, dict) else range(len(inside)))
            inside = holder[key] if rng.random() < 0.8 else None
        holder[key] = rng.choice(VALUES)
        return json.dumps(content).encode()
    new = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, length = rng.randrange(len(new) + 1), rng.choice([1, 2, 16, 200])
        at = min(at, rng.randrange(600)) if rng.random() < 0.5 else at
        word = rng.choice([rng.choice(WORDS), rng.randbytes(length), bytes(new[at : at + length])])
        new[at : at + rng.choice([0, length, len(word), len(new)])] = word
    return bytes(new)


def shards(folder: Path) -> list[Path]:
    with ShardWriter(folder, "t", 8) as writer:
        for key in "ab":
            writer.write(key, {"video.npy": VIDEO, "segmentations.npy.gz": np.ones((6, 16, 16, 1), np.uint8)})
        mp4 = encode_file(folder.parent / "film.mp4", VIDEO, "mpeg4", "yuv420p").read_bytes()
        writer.write("c", {"video.mp4": mp4, "segmentations.npy.gz": np.ones((6, 16, 16, 1), np.uint8)})
    return [folder / "t-000000.tar", folder / "index.json"]


def load(folder: Path, **options: Any) -> None:
    options = {"batch_size": 2, "num_workers": 0, "image_size": 8, "on_bad_sample": "skip", **options}
    data = ShardDataModule(validation=str(folder / "t-*.tar"), **options)
    data.setup("validate")
    for _ in data.val_dataloader():
        pass


def run(*words: object) -> None:
    """Runs a command, whose exit status 2 is an error of ours unless there is a traceback."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        status = main([str(word) for word in words])
    assert status in (0, 1, 2)
    assert "Traceback" not in said.getvalue()
    if status:
        raise ConfigError(said.getvalue())


class Target(NamedTuple):
    make: Callable[[Path], list[Path]]  # writes good files into a folder, and returns those to damage
    read: Callable[[Path], object]


def converting(kind: str, make: Callable[[Path], list[Path]], *words: str) -> Target:
    common = ("data", "convert", kind, "--workers", 0, *words)
    return Target(make, lambda folder: run(*common, "--root", folder, "--out", folder.parent / "out"))


def member(name: str) -> Target:
    def make(folder: Path) -> list[Path]:
        path = folder / name
        if name == "json":
            path.write_text('{"a": [1, {"b": "c"}]}')
        elif "npy" in name:
            path.write_bytes(encode_member(f"video.{name}", VIDEO))
        else:
            Image.fromarray(VIDEO[0]).save(path, {"jpg": "JPEG", "png": "PNG"}[name])
        return [path]

    return Target(make, lambda folder: decode_member(f"video.{name}", (folder / name).read_bytes(), "here"))


def written(folder: Path, files: Mapping[str, Any]) -> list[Path]:
    """Writes texts and JSON."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return [folder / name for name in files]


def davis(folder: Path) -> list[Path]:
    davis_set(folder, names=("bear",))
    return [folder / "ImageSets/2017/train.txt", *sorted(folder.glob("*/480p/bear/00000.*"))]


def videos(folder: Path) -> list[Path]:
    own_set(folder)
    return [encode_file(folder / "c.mp4", VIDEO, "mpeg4", "yuv420p"), folder / "a/00001.png", folder / "a_masks/1.png"]


def ytvis(folder: Path) -> list[Path]:
    ytvis_set(folder, videos=2)
    return [folder / "train/instances.json"]


def movi(folder: Path) -> list[Path]:
    write_movi(folder, counts=(2,))
    return [*folder.glob("*.tfrecord*")]


def checkpoint(folder: Path) -> list[Path]:
    torch.save({"state_dict": {"a.b": torch.zeros(3, 3)}, "epoch": 3}, folder / "a.ckpt")
    return [folder / "a.ckpt"]


def read_inputs(folder: Path) -> None:
    for video in find_videos([str(folder / "c.mp4"), str(folder / "a")]):
        list(video.frames())


RUN = "runs/slots_7/with/seed_0"
MATRIX = {"variants": [{"name": "with", "description": "as it is"}], "seeds": [0], "slots": [7], "baseline": "with"}
COMPARED = {
    "matrix.json": {**MATRIX, "command": [], "config": [""]},
    f"{RUN}/summary.json": {"rows": {"grid": {"video_ari": 0.1}}},
    f"{RUN}/evaluation.json": {"scores": {"video_ari": 0.5}, "first_step": 0, "untrained": {"video_ari": 0.1}},
    f"{RUN}/job.json": {"recipe": "a", "source": "with", "command": ["ssync-pl", "fit"]},
    f"{RUN}/metrics.csv": "step,ssync/merged_slots\n1,2\n2,\n",
}
OFFICIAL = """globals: {A: 3}
model: {losses: {x: {name: MSELoss, dims: [0, "${globals.A}"]}}}
optimizer: {lr: "${eval: 'a * 2', ${globals.A}}"}
"""
TARGETS = {
    **{name: member(name) for name in ("npy", "npy.gz", "png", "jpg", "json")},
    "shards": Target(shards, load),
    "stream": Target(shards, lambda folder: load(folder, backend="webdataset", on_bad_sample="raise")),
    "check": Target(shards, lambda folder: run("data", "check", folder / "t-000000.tar", "--workers", 0)),
    "preview": Target(shards, lambda folder: run("data", "preview", folder / "t-*.tar", "--out", folder / "s.png")),
    "ytvis": converting("ytvis2021", ytvis, "--splits", "train", "--holdout", "1"),
    "davis": converting("davis", davis, "--splits", "train"),
    "movi": converting("movi", movi, "--on-bad-sample", "skip"),
    "videos": converting("videos", videos, "--on-bad-sample", "skip"),
    "inputs": Target(videos, read_inputs),
    "comparison": Target(partial(written, files=COMPARED), lambda folder: load_comparison(folder).frame),
    "official": Target(partial(written, files={"a": OFFICIAL}), lambda folder: run("config", "convert", folder / "a")),
    "checkpoint": Target(checkpoint, lambda folder: read_checkpoint(folder / "a.ckpt")),
    "settings": Target(
        lambda folder: [write_tiny(folder / "a.yaml", folder)],
        lambda folder: run("fit", "--config", folder / "a.yaml", "--print_config"),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [30, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused_by_name(tmp_path, name, count):
    target, folder = TARGETS[name], tmp_path / "in"
    folder.mkdir()
    good = {path: path.read_bytes() for path in target.make(folder)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(SSyncError):
        target.read(folder)
    made = {folder / name for name in ("index.json", "ssync_index.json", "s.png")}

    def others() -> dict[Path, bytes]:
        files = {path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "out" not in path.parents}
        return {path: path.read_bytes() for path in files - made - good.keys()}

    there = others()
    for number in range(count):
        rng = random.Random(f"{name} {number}")
        path = rng.choice([*good])
        path.write_bytes(damaged(good[path], rng))
        try:
            target.read(folder)
        except SSyncError:
            pass
        except Exception as error:
            pytest.fail(f"{name} {number}: {path.name} ended in {type(error).__name__}: {error}")
        assert others() == there, f"{name} {number} wrote elsewhere"
        path.write_bytes(good[path])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (folder / "s.png").unlink(missing_ok=True)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after <= max(before, 2 << 20), "more than 2 GiB"
