import functools
import gzip
import io
import multiprocessing
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import ssync_pl.data.synthetic.dataset as dataset
from ssync_pl.cli import main
from ssync_pl.data.files import exclusive
from ssync_pl.data.index import read_index
from ssync_pl.data.shards import ShardWriter
from ssync_pl.data.synthetic import SceneConfig, dataset_folder, generate, preset, render_video
from ssync_pl.errors import ConfigError

TINY = SceneConfig(name="tiny", resolution=8, frames=1, max_objects=3, antialias=1)
SPLITS = {"train": 33, "validation": 2}
NAMES = ["tiny-train-000000.tar", "tiny-train-000001.tar", "tiny-validation-000000.tar"]


def _make(root: Path, seed: int = 0, **changes) -> Path:
    return generate(root, TINY, **{"splits": SPLITS, "seed": seed, "num_workers": 0, **changes})


def _members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return _make(tmp_path_factory.mktemp("made"))


def test_a_set_is_what_the_renderer_gives_and_carries_its_recipe(made):
    assert [path.name for path in _shards(made)] == NAMES
    index = read_index(made)
    assert (index.recipe["seed"], index.recipe["splits"]) == (0, SPLITS)
    members = _members(made / NAMES[1])
    assert sorted(members) == ["000032.segmentations.npy.gz", "000032.video.npy"]
    arrays = render_video(TINY, index.recipe["split_seeds"]["train"], 32)
    video = np.load(io.BytesIO(members["000032.video.npy"]), allow_pickle=False)
    masks = np.load(io.BytesIO(gzip.decompress(members["000032.segmentations.npy.gz"])), allow_pickle=False)
    assert (video == arrays["video"]).all()
    assert (masks == arrays["segmentations"]).all()


def test_splits_and_seeds_share_no_video(made, tmp_path):
    paths = [*_shards(made), *_shards(_make(tmp_path, seed=1))]
    videos = [data for path in paths for name, data in _members(path).items() if name.endswith("video.npy")]
    assert len(set(videos)) == len(videos) == 70
    pickle.dumps(functools.partial(dataset._render, TINY))  # for workers


def test_a_finished_set_is_not_touched(tmp_path, monkeypatch):
    folder = _make(tmp_path)
    for path in folder.glob(".*"):  # sets of the first releases have no such records
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(dataset, "convert", None)
    assert _make(tmp_path) == folder == dataset_folder(tmp_path, TINY, SPLITS)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_names_of_folders_depend_on_everything_and_stay():
    recipes = [(TINY, SPLITS), (preset("a", name="tiny"), SPLITS), (TINY, {"train": 3}), (TINY, SPLITS, 1)]
    assert len({dataset_folder("x", *recipe) for recipe in recipes}) == 4
    # folders on users' disks are named like these
    names = [dataset_folder("x", preset(name), {"train": 440, "validation": 48}).name for name in ("a", "a_zoom", "c")]
    assert names == ["a-49e915423d52", "a_zoom-15de0900be59", "c-559fddd9bad8"]


def test_what_was_stopped_goes_on(made, tmp_path, monkeypatch):
    def stop(writer, key, members, real=ShardWriter.write):
        return 1 / 0 if key == "000032" else real(writer, key, members)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", stop)
        with pytest.raises(ZeroDivisionError):
            _make(tmp_path)
    (first,) = tmp_path.rglob("*.tar")
    stamp = first.stat().st_mtime_ns
    folder = _make(tmp_path)
    assert first.stat().st_mtime_ns == stamp
    assert [path.read_bytes() for path in _shards(folder)] == [path.read_bytes() for path in _shards(made)]


def test_one_of_two_runs_waits_for_the_other(tmp_path, monkeypatch):
    counted = Mock(side_effect=render_video)
    monkeypatch.setattr(dataset, "render_video", counted)
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(_make, [tmp_path, tmp_path]))) == 1
    assert counted.call_count == 35


@pytest.mark.parametrize("changes", [{"splits": {"train": 0}}, {"seed": -1}, {"seed": True}])
def test_bad_arguments_are_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match=f"`{next(iter(changes))}"):
        _make(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_script_without_main_guard_is_told_instead_of_waiting_for_itself(tmp_path, monkeypatch):
    folder = dataset_folder(tmp_path, TINY, SPLITS)
    folder.mkdir()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with exclusive(folder / ".generate.lock"), pytest.raises(RuntimeError, match="__main__"):
        _make(tmp_path, num_workers=2)


def test_the_command_refuses_a_crowd(tmp_path, capsys):
    crowd = ["--set", "spawn_extent=0.1", "--set", "spawn_height=[1, 1]"]
    assert main(["data", "generate", "--out", str(tmp_path / "new"), *crowd]) == 2
    assert "Raise `spawn_extent`" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
