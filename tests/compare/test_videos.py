"""Which videos are scored: never those that are trained on, and a name for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import feature_host, feature_videos, fit, read, synthetic, tiny_savi
from torch.utils.data import DataLoader, Subset

from ssync_pl.compare.recorder import RunRecorder
from ssync_pl.compare.videos import ShapeTable, flat_loaders, refuse_shared_videos, video_names
from ssync_pl.data import ShardDataModule
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import SlotContrast


def test_the_hash_names_the_videos_that_were_scored(tmp_path: Path, root: Path) -> None:
    hashes = {}
    for name, options in {
        "whole": {},
        "again": {"val_batch_size": 5},
        "part": {"limit": 1},
        "others": {"data_seed": 1},
    }.items():
        limit = options.pop("limit", None)
        recorder = RunRecorder(videos=0, probe=False)
        extra = {} if limit is None else {"limit_val_batches": limit}
        _, folder = fit(tmp_path / name, tiny_savi(), [recorder], synthetic(root, **options), max_steps=1, **extra)
        hashes[name] = read(folder)["val_keys_hash"]
        assert read(folder)["num_videos"] == (2 if limit else 5)
    assert hashes["whole"] == hashes["again"]
    assert len({hashes[name] for name in ("whole", "part", "others")}) == 3


def test_training_videos_are_never_scored(tmp_path: Path, root: Path) -> None:
    data = synthetic(root)
    data.prepare_data()
    data.setup("fit")
    shards = data.patterns["train"]
    same = ShardDataModule(train=shards, validation=str(shards), batch_size=2, clip_length=2, num_workers=0)
    with pytest.raises(ConfigError, match="4 of 4 are in the training set"):
        fit(tmp_path, tiny_savi(), [RunRecorder()], same)
    items = feature_videos(6, 1)
    train = DataLoader(Subset(items, [0, 1, 2, 3]), batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 of 3"):
        fit(tmp_path, feature_host(SlotContrast), [RunRecorder()], train, DataLoader(Subset(items, [3, 4, 5])))  # type: ignore[arg-type]
    assert not (tmp_path / "evaluation.json").exists()
    # without a validation in the training, it shows at its end
    with pytest.raises(ConfigError, match="1 of 3"):
        fit(
            tmp_path,
            feature_host(SlotContrast),
            [RunRecorder()],
            train,
            DataLoader(Subset(items, [3, 4, 5])),  # type: ignore[arg-type]
            num_sanity_val_steps=0,
        )
    assert not (tmp_path / "evaluation.json").exists()


def test_keys_that_two_sets_share_are_not_one_video(root: Path) -> None:
    """The packaged set counts the videos of each part from 0."""
    data = synthetic(root)
    data.prepare_data()
    data.setup("fit")
    train, validation = data.train_dataloader(), data.val_dataloader()
    names = video_names(train), video_names(validation)
    assert [len(part or ()) for part in names] == [4, 5]
    refuse_shared_videos(train, validation)
    refuse_shared_videos({"one": train}, [validation, None])
    assert flat_loaders([validation, None]) == [validation]


@pytest.mark.parametrize("link", [False, True])
def test_streams_and_other_paths_to_a_folder_are_seen_through(tmp_path: Path, root: Path, link: bool) -> None:
    data = synthetic(root)
    data.prepare_data()
    data.setup("fit")
    pattern = Path(str(data.patterns["train"]))
    folder = pattern.parent
    if link:
        folder = tmp_path / "link"
        folder.symlink_to(pattern.parent)
    backend: Any = "mmap" if link else "webdataset"
    again = ShardDataModule(
        train=str(pattern),
        validation=str(folder / pattern.name),
        batch_size=2,
        clip_length=2,
        num_workers=0,
        backend=backend,
    )
    again.setup("fit")
    with pytest.raises(ConfigError, match="4 of 4"):
        refuse_shared_videos(data.train_dataloader(), again.val_dataloader())


def test_sets_that_do_not_say_what_they_hold_are_let_through() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    loader = DataLoader(Stream())
    assert video_names(loader) is None
    refuse_shared_videos(loader, loader)


def test_shapes_are_those_of_the_scene(root: Path) -> None:
    data = synthetic(root)
    data.prepare_data()
    data.setup("fit")
    loader = data.val_dataloader()
    dataset = data._datasets["validation"]
    table = ShapeTable(loader)
    keys = [sample.key for _, sample in dataset.samples]
    classes = table.classes(keys, 12, has_background=True)
    assert classes is not None
    named: dict[int, str] = {}
    for row, place in zip(classes, range(len(keys)), strict=True):
        facts = dataset.members(place).decode("instances.json")
        wanted = {one["id"]: one["shape"] for one in facts["instances"]}
        assert {index for index, number in enumerate(row.tolist()) if number >= 0} == set(wanted)
        for index, shape in wanted.items():
            assert named.setdefault(int(row[index]), shape) == shape
    assert len(set(named.values())) == len(named) > 1
    shifted = table.classes(keys, 11, has_background=False)
    assert shifted is not None
    assert torch.equal(shifted, classes[:, 1:])
    assert table.classes(["unknown"], 12, has_background=True) is None
