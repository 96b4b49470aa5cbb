"""Masks as sets store them, up to the scores that a host logs."""

from __future__ import annotations

import lightning.pytorch as L
import numpy as np
import pytest

from ssync_pl.data import ShardDataModule
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ShardError
from ssync_pl.hosts import SAVi

SMALL = {"encoder_channels": (8,), "encoder_strides": (2,), "decoder_channels": (8,), "decoder_strides": (2,)}


def _shards(folder, masks):
    with ShardWriter(folder, "v") as writer:
        for index, mask in enumerate(masks):
            video = np.full((mask.shape[0], 16, 16, 3), 40 * index, np.uint8)
            writer.write(f"{index:06d}", {"video.npy": video, "segmentations.npy": mask})
    return f"{folder}/v-*.tar"


def _module(pattern, **options):
    data = ShardDataModule(validation=pattern, batch_size=2, num_workers=0, image_size=16, **options)
    data.prepare_data()
    data.setup("validate")
    return data


def test_overlapping_instance_channels_are_scored_without_the_overlap(tmp_path):
    masks = np.zeros((2, 3, 16, 16, 2), np.uint8)
    masks[..., :10, :, 0] = 4
    masks[..., 6:, :, 1] = 7
    data = _module(_shards(tmp_path, masks), has_background=False)
    assert data.ignore_overlaps
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    host = SAVi(num_slots=2, slot_dim=16, feature_dim=16, decoder_broadcast=(4, 4), **SMALL)
    (scores,) = trainer.validate(host, data, verbose=False)
    assert host.evaluation.ignore_overlaps
    assert 0.0 <= scores["val/video_mbo"] <= 1.0


def test_id_masks_without_a_last_axis_keep_their_ids(tmp_path):
    mask = np.zeros((3, 16, 16), np.uint8)
    mask[:, :4] = 1
    mask[:, 8:] = 2
    data = _module(_shards(tmp_path, [mask]))
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert batch["segmentations"].shape[2] == 3
    assert batch["segmentations"][0, 0].flatten(1).sum(1).tolist() == [64, 64, 128]


def test_ids_above_a_byte_are_refused(tmp_path):
    mask = np.zeros((3, 16, 16, 1), np.int32)
    mask[:, :4] = 256
    with pytest.raises(ShardError, match="255 at most in the masks of `validation`"):
        _module(_shards(tmp_path, [mask]))
