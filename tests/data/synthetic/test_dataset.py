from __future__ import annotations

import errno
import gzip
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssync_pl.cli import main
from ssync_pl.data.index import read_index
from ssync_pl.data.shards import ShardWriter
from ssync_pl.data.synthetic import PRESETS, SceneConfig, dataset_folder, generate, preset, render_scene, split_seed
from ssync_pl.errors import ConfigError, ShardError

TINY = SceneConfig(name="tiny", resolution=16, frames=2, antialias=1)
SPLITS = {"train": 3, "validation": 2}


def _make(root: Path, **changes: Any) -> Path:
    return generate(root, TINY, **{"splits": SPLITS, "samples_per_shard": 2, "progress": False, **changes})


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def test_shards_hold_what_the_renderer_gives(tmp_path: Path) -> None:
    folder = _make(tmp_path / "new")
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "tiny-train-000000.tar",
        "tiny-train-000001.tar",
        "tiny-validation-000000.tar",
    ]
    members = _members(folder / "tiny-train-000001.tar")
    assert sorted(members) == ["000002.instances.json", "000002.segmentations.npy.gz", "000002.video.npy"]
    arrays, facts = render_scene(TINY, split_seed(0, "train"), 2)
    video = np.load(io.BytesIO(members["000002.video.npy"]), allow_pickle=False)
    masks = np.load(io.BytesIO(gzip.decompress(members["000002.segmentations.npy.gz"])), allow_pickle=False)
    assert (video == arrays["video"]).all()
    assert (masks == arrays["segmentations"]).all()
    assert json.loads(members["000002.instances.json"]) == facts


def test_index_carries_counts_and_recipe(tmp_path: Path) -> None:
    folder = _make(tmp_path, seed=5)
    index = read_index(folder)
    assert index is not None
    assert index.recipe["seed"] == 5
    assert index.recipe["splits"] == SPLITS
    assert SceneConfig(**index.recipe["config"]) == TINY
    assert sum(len(entry.samples) for entry in index.shards.values()) == 5


def test_splits_and_seeds_share_no_video(tmp_path: Path) -> None:
    folder = _make(tmp_path)
    other = _make(tmp_path, seed=1)
    videos = []
    for path in sorted([*folder.glob("*.tar"), *other.glob("*.tar")]):
        videos += [data for name, data in _members(path).items() if name.endswith("video.npy")]
    assert len(set(videos)) == len(videos) == 10


def test_workers_change_nothing(tmp_path: Path) -> None:
    alone = _make(tmp_path / "one", num_workers=0)
    helped = _make(tmp_path / "two", num_workers=2)
    assert alone.name == helped.name
    for path in alone.iterdir():
        assert path.read_bytes() == (helped / path.name).read_bytes()


def test_second_call_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _make(tmp_path)
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    def refuse(*_: Any) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr("ssync_pl.data.synthetic.dataset.render_scene", refuse)
    assert _make(tmp_path) == folder == dataset_folder(tmp_path, TINY, SPLITS, 0, 2)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps


def test_folder_name_depends_on_everything() -> None:
    base = dataset_folder("x", TINY, SPLITS, 0, 2)
    others = [
        dataset_folder("x", SceneConfig(name="tiny", resolution=17), SPLITS, 0, 2),
        dataset_folder("x", TINY, {"train": 3}, 0, 2),
        dataset_folder("x", TINY, SPLITS, 1, 2),
        dataset_folder("x", TINY, SPLITS, 0, 3),
    ]
    assert len({base, *others}) == 5
    assert len(base.name) == len("tiny-") + 12


def test_folders_of_older_settings_keep_their_names() -> None:
    names = [dataset_folder("x", preset(name)).name for name in ("a", "a_zoom", "c")]
    assert names == ["a-49e915423d52", "a_zoom-15de0900be59", "c-559fddd9bad8"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_command_makes_every_preset(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "generate", "--preset", name, "--out", str(tmp_path), "--train", "1", "--validation", "0"]
    assert main([*words, "--resolution", "16", "--frames", "2", "--workers", "0"]) == 0
    assert f"{name}-train-000000.tar (1 video)" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    index = read_index(folder)
    assert index is not None
    assert SceneConfig(**index.recipe["config"]) == preset(name, resolution=16, frames=2)


def test_the_command_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "generate", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    listed = text.split("look of the scenes: ")[1].split(" (default")[0]
    assert listed.replace(" or ", ", ").split(", ") == list(PRESETS)


def test_the_command_refuses_a_crowd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "generate", "--preset", "e", "--out", str(tmp_path / "new"), "--set", "resting_extent=1"]
    assert main(words) == 2
    assert "Raise `resting_extent`" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_order_of_splits_does_not_matter() -> None:
    assert dataset_folder("x", TINY, {"a": 1, "b": 2}) == dataset_folder("x", TINY, {"b": 2, "a": 1})


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ShardWriter.write

    def full(self: ShardWriter, key: str, members: Any) -> None:
        if key == "000001":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, key, members)

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(ShardError, match=r"No space left on device.*free some space"):
        _make(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(ShardWriter, "write", real)
    assert _make(tmp_path).is_dir()


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        _make(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_killed_run_is_not_taken_for_complete(tmp_path: Path) -> None:
    code = (
        "import sys; from ssync_pl.data.synthetic import *\n"
        "generate(sys.argv[1], SceneConfig(name='tiny', resolution=16, frames=2, antialias=1),"
        " splits={'train': 20000}, samples_per_shard=2, num_workers=0, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60.0
        while not list(tmp_path.glob(".*/*.tar")) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.glob(".*/*.tar"))
    assert not dataset_folder(tmp_path, TINY, {"train": 20000}, 0, 2).exists()
    assert not list(tmp_path.glob("tiny-*"))


def test_the_later_of_two_processes_drops_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ssync_pl.data.synthetic.dataset as module

    fill = module._fill
    rivals = []

    def slow(folder: Path, *rest: Any) -> None:
        fill(folder, *rest)
        if not rivals:
            rivals.append(folder)
            # another process finishes the same set in the meantime
            _make(tmp_path)

    monkeypatch.setattr(module, "_fill", slow)
    folder = _make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert read_index(folder) is not None


@pytest.mark.parametrize("damage", ["delete", "cut", "index", "recipe"])
def test_damaged_folder_is_named(tmp_path: Path, damage: str) -> None:
    folder = _make(tmp_path)
    shard, index = folder / "tiny-train-000000.tar", folder / "index.json"
    if damage == "delete":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1024])
    elif damage == "index":
        index.unlink()
    else:
        content = json.loads(index.read_text())
        content["recipe"]["seed"] = 9
        index.write_text(json.dumps(content))
    with pytest.raises(ShardError, match="Delete the folder"):
        _make(tmp_path)


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(ShardError, match="Choose another folder"):
        _make(root)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"splits": {}}, "splits"),
        ({"splits": {"train": 0}}, "train"),
        ({"splits": {"../x": 1}}, "letters, digits and `_`"),
        ({"seed": -1}, "`seed`"),
        ({"samples_per_shard": 0}, "`samples_per_shard`"),
        ({"num_workers": -1}, "`num_workers`"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        _make(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_script_without_main_guard_still_gets_its_data(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from ssync_pl.data.synthetic import *\n"
        "config = SceneConfig(name='tiny', resolution=16, frames=2, antialias=1)\n"
        f"generate({str(tmp_path / 'data')!r}, config, splits={{'train': 3}}, num_workers=2, progress=False)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=True)
    assert "num_workers=0" in done.stderr
    names = [path.name for path in (tmp_path / "data").iterdir()]
    assert names == [dataset_folder("x", TINY, {"train": 3}).name]
