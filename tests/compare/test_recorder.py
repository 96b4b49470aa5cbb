"""The recorder writes what runs are compared by, and changes no bit of a training."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image
from recorded_runs import feature_host, feature_loaders, feature_videos, fit, read, synthetic, tiny_savi
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ssync_pl import SSyncCallback
from ssync_pl.compare import evaluation
from ssync_pl.compare.recorder import RunRecorder
from ssync_pl.compare.videos import refuse_shared_videos
from ssync_pl.data import ShardDataModule
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR, SOLV, SlotContrast, VideoSAUR
from ssync_pl.metrics import SegmentationMetrics, metric_names

SCORES = {*metric_names("segmentation"), *metric_names("slots")}
BOTH_MAPS = SCORES | {f"encoder_{name}" for name in SCORES}


def test_savi_on_the_packaged_set(tmp_path: Path, root: Path) -> None:
    trainer, folder = fit(tmp_path, tiny_savi(), [RunRecorder(videos=3, frames=2)], synthetic(root))
    content = read(folder)
    assert set(content["scores"]) == BOTH_MAPS
    assert content["steps"] == 4
    assert content["num_videos"] == 5  # each once, although they come in batches of two
    assert content["scores"]["used_slots"] + content["scores"]["unused_slots"] == 4.0
    assert set(content["probe"]) == {"position_r2", "color_r2"}
    assert all(value <= 1.0 for value in content["probe"].values())
    assert (content["first_step"], content["device"][:3]) == (0, "CPU")
    pictures = json.loads((folder / "pictures.json").read_text())
    assert [video["key"] for video in pictures] == ["000000", "000001", "000002"]
    data = trainer.datamodule  # type: ignore[attr-defined]
    strips = {title: strip_of(strip) for title, strip in pictures[0]["columns"].items()}
    assert list(strips) == ["frame", "truth", "encoder", "decoder", "regions"]
    assert {strip.shape for strip in strips.values()} == {(2 * 112 + 3, 112, 3)}  # two frames and a gap
    stored = data._datasets["validation"][0]
    background = (stored["segmentations"].numpy()[2, ..., 0] == 0).repeat(7, 0).repeat(7, 1)
    assert (strips["truth"][115:][background] == 70).all()
    assert not (strips["truth"][115:][~background] == 70).all(-1).any()


def strip_of(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def test_scores_are_those_of_the_trained_host(tmp_path: Path) -> None:
    host = feature_host(SlotContrast, slot_init="learned")
    trainer, folder = fit(tmp_path, host, [RunRecorder()], *feature_loaders())
    metrics = SegmentationMetrics()
    host.eval()
    for batch in DataLoader(feature_videos(6, 1), batch_size=2):  # type: ignore[arg-type]
        with torch.no_grad():
            metrics.update(host.evaluate(batch)[0], batch["segmentations"])
    scores = read(folder)["scores"]
    for name, value in metrics.compute().items():
        assert scores[name] == pytest.approx(value.item(), abs=1e-9), name
    encoder = SegmentationMetrics()
    for batch in DataLoader(feature_videos(6, 1), batch_size=2):  # type: ignore[arg-type]
        with torch.no_grad():
            attention = host(batch["features"]).attention_logits.softmax(2).unflatten(-1, host.grid)
            encoder.update(attention, batch["segmentations"])
    for name, value in encoder.compute().items():
        assert scores[f"encoder_{name}"] == pytest.approx(value.item(), abs=1e-9), name
    # the training's own last validation, where slots are not drawn at random
    assert scores["video_mbo"] == pytest.approx(float(trainer.callback_metrics["val/video_mbo"]), abs=1e-6)


@pytest.mark.parametrize("callbacks", [[], [SSyncCallback]], ids=["host", "with SSync"])
def test_no_bit_of_the_training_changes(tmp_path: Path, root: Path, callbacks: list[Any]) -> None:
    results = []
    for name in ("plain", "recorded"):
        host = tiny_savi()
        extra: list[L.Callback] = [RunRecorder()] if name == "recorded" else []
        made = [kind(warmup_ratio=0.25) for kind in callbacks]
        options = {"max_epochs": 3, "max_steps": -1}
        trainer, _ = fit(tmp_path / name, host, made + extra, synthetic(root), **options)
        results.append((host.state_dict(), torch.get_rng_state(), dict(trainer.callback_metrics)))
        assert not host._forward_hooks
        assert not any(module._forward_hooks for module in host.modules())
    (weights, state, metrics), (others, other_state, other_metrics) = results
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert torch.equal(state, other_state)
    assert metrics.keys() == other_metrics.keys()
    assert all(torch.equal(value, other_metrics[name]) for name, value in metrics.items())


@pytest.mark.parametrize(
    ("kind", "ssync"),
    [(SlotContrast, False), (SlotContrast, True), (SOLV, False), (SOLV, True), (VideoSAUR, False), (DINOSAUR, True)],
)
def test_every_host_on_cached_features(tmp_path: Path, kind: Any, ssync: bool) -> None:
    callbacks: list[L.Callback] = [SSyncCallback(warmup_ratio=0.5)] if ssync else []
    _, folder = fit(tmp_path, feature_host(kind), [*callbacks, RunRecorder()], *feature_loaders())
    content = read(folder)
    # SOLV may order its slots anew after decoding, DINOSAUR sees frames as images of their own.
    fits = {SOLV: (SCORES, BOTH_MAPS), DINOSAUR: (SCORES,)}.get(kind, (BOTH_MAPS,))
    assert set(content["scores"]) in fits
    assert {"position_r2"} <= set(content["probe"])
    pictures = json.loads((folder / "pictures.json").read_text())
    assert [video["key"] for video in pictures] == [f"1-{index}" for index in range(6)]


def test_slots_of_solv_are_matched_by_their_own_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its evaluation links slots over time, which renames masks but not slots."""
    given: list[tuple[Tensor, Tensor]] = []
    whole = evaluation.sample_slots

    def spy(slots: Tensor, masks: Tensor, *args: Any, **options: Any) -> Any:
        given.append((slots, masks))
        return whole(slots, masks, *args, **options)

    monkeypatch.setattr(evaluation, "sample_slots", spy)
    host = feature_host(SOLV, merge_threshold=None)
    fit(tmp_path, host, [RunRecorder(videos=0)], *feature_loaders())
    host.eval()
    assert len(given) == 3
    for (slots, labels), batch in zip(given, DataLoader(feature_videos(6, 1), batch_size=2), strict=True):  # type: ignore[arg-type]
        with torch.no_grad():
            output = host(batch["features"])
        torch.testing.assert_close(output.slots, slots)
        small = labels[..., 2::4, 2::4].flatten(2)
        assert (output.masks.argmax(2) == small).float().mean() > 0.9
    assert not (tmp_path / "pictures.json").exists()


def test_batches_without_frames_give_scores_but_no_pictures(tmp_path: Path) -> None:
    train, _ = feature_loaders()
    bare = [{name: value for name, value in item.items() if name != "video"} for item in feature_videos(6, 1)]
    with pytest.warns(UserWarning, match="keeps no more pictures"):
        _, folder = fit(tmp_path, feature_host(SlotContrast), [RunRecorder()], train, DataLoader(bare, batch_size=2))  # type: ignore[arg-type]
    content = read(folder)
    assert set(content["probe"]) == {"position_r2"}
    assert not (folder / "pictures.json").exists()


def test_padding_is_neither_scored_nor_drawn(tmp_path: Path) -> None:
    train, _ = feature_loaders()
    items = feature_videos(4, 1)
    for index, item in enumerate(items):
        item["batch_padding_mask"] = torch.tensor(index != 1)
        item["frame_mask"] = torch.tensor([True, index != 2, index != 2])
    _, folder = fit(tmp_path, feature_host(SlotContrast), [RunRecorder()], train, DataLoader(items, batch_size=2))  # type: ignore[arg-type]
    assert read(folder)["num_videos"] == 3
    pictures = json.loads((folder / "pictures.json").read_text())
    assert [video["key"] for video in pictures] == ["1-0", "1-2", "1-3"]
    frames = strip_of(pictures[1]["columns"]["frame"])
    assert (frames[:112] == frames[-112:]).all()  # one real frame, four times


def test_no_validation_set_leaves_no_scores(tmp_path: Path) -> None:
    train, _ = feature_loaders()
    with pytest.warns(UserWarning, match="no validation set"):
        _, folder = fit(tmp_path, feature_host(SlotContrast), [RunRecorder()], train, None)
    content = read(folder)
    assert content["scores"] == {}
    assert content["num_videos"] == 0


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="frames"):
        RunRecorder(frames=0)
    with pytest.raises(ConfigError, match="videos"):
        RunRecorder(videos=-1)

    class Other(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ConfigError, match="SlotHost"):
        fit(tmp_path, Other(), [RunRecorder()], *feature_loaders())
    train, _ = feature_loaders()
    blind = [{"features": item["features"]} for item in feature_videos(2, 1)]
    with pytest.raises(ConfigError, match="segmentations"):
        fit(
            tmp_path,
            feature_host(SlotContrast),
            [RunRecorder()],
            train,
            DataLoader(blind),  # type: ignore[arg-type]
            num_sanity_val_steps=0,
            check_val_every_n_epoch=100,
        )


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
    refuse_shared_videos(train, validation)
    refuse_shared_videos({"one": train}, [validation, None])


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
    refuse_shared_videos(loader, loader)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [SlotContrast, SOLV])
def test_on_cuda(tmp_path: Path, kind: Any) -> None:
    host = feature_host(kind)
    callbacks = [SSyncCallback(warmup_ratio=0.5), RunRecorder()]
    _, folder = fit(tmp_path, host, callbacks, *feature_loaders(), accelerator="cuda", devices=1, max_steps=30)
    content = read(folder)
    assert set(content["scores"]) >= (BOTH_MAPS if kind is SlotContrast else SCORES)
    assert "position_r2" in content["probe"]
    assert (folder / "pictures.json").exists()
    assert next(host.parameters()).device.type == "cpu"  # where Lightning leaves it
