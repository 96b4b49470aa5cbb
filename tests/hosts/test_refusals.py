import math
from typing import Any

import pytest
import torch
from tiny_models import encoder_of, pixel_clips, tiny, window_clips

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts import SOLV, SAVi, VideoSAUR
from ssync_pl.hosts.losses import slot_contrast_loss, temporal_similarity, temporal_similarity_loss
from ssync_pl.hosts.nn.decoders import MLPDecoder, SlotMixerDecoder
from ssync_pl.hosts.nn.initializers import ConditionedSlots, first_frame_hints
from ssync_pl.hosts.nn.pixels import ConvEncoder, SpatialBroadcastDecoder
from ssync_pl.hosts.nn.slot_attention import SlotAttention, SlotCorrector, init_soft_kmeans_
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer
from ssync_pl.hosts.training import exponential_for, schedule_for

VIDEO, HINTS, SLOTS = pixel_clips()["video"], torch.zeros(2, 3, 4), torch.zeros(2, 2, 3, 4)
ALL = torch.ones(2, 2, dtype=torch.bool)
REFUSED = [
    (lambda: tiny(SAVi, slot_init="zeros"), ConfigError, "`slot_init` to be 'gaussian'"),
    (lambda: tiny(SAVi, encoder_strides=(1,)), ConfigError, "`encoder_channels` and `encoder_strides`"),
    (lambda: tiny(SAVi, num_slots=0), ConfigError, "`num_slots`"),
    (lambda: tiny(VideoSAUR, reconstruction_weight=0.0, similarity_weight=0.0), ConfigError, "reconstruction_weight"),
    (lambda: tiny(VideoSAUR, similarity_shift=0), ConfigError, "similarity_shift"),
    (lambda: tiny(VideoSAUR, slot_init="boxes"), ConfigError, "slot_init"),
    (lambda: tiny(VideoSAUR, decoder="broadcast"), ConfigError, "decoder"),
    (lambda: tiny(VideoSAUR, feature_windows=0.0), ConfigError, "feature_windows"),
    (lambda: tiny(VideoSAUR, decoder="fourier"), ConfigError, "fourier_bands"),
    (lambda: tiny(VideoSAUR, fourier_decay=1.0), ConfigError, "fourier_decay"),
    (lambda: tiny(VideoSAUR, num_slots=0), ConfigError, "num_slots"),
    (lambda: tiny(VideoSAUR, iterations_later=0), ConfigError, "iterations"),
    (lambda: tiny(VideoSAUR, encoder_position=0.5, encoder_hidden=0), ConfigError, "encoder_hidden"),
    (lambda: tiny(VideoSAUR, corrector_init="kmeans", encoder_hidden=0), ConfigError, "as many channels"),
    (lambda: tiny(VideoSAUR, corrector_sharpness=2.0), ConfigError, "corrector_init"),
    (lambda: tiny(VideoSAUR, corrector_init="means"), ConfigError, "corrector_init"),
    (lambda: tiny(VideoSAUR, init="fan"), ConfigError, "init"),
    (lambda: tiny(VideoSAUR, init="fan_in", encoder_hidden=0, decoder="mixer"), ConfigError, "neither"),
    (lambda: tiny(SOLV, edge_probability=2.0), ConfigError, "`edge_probability`"),
    (lambda: tiny(SOLV, merge_rise=0.5), ConfigError, "`merge_rise`"),
    (lambda: tiny(SOLV, linking="never"), ConfigError, "`linking`"),
    (lambda: tiny(SOLV, link_by="names"), ConfigError, "`link_by`"),
    (lambda: tiny(SOLV, slot_init="boxes"), ConfigError, "slot_init"),
    (lambda: tiny(SOLV, corrector_init="other"), ConfigError, "`corrector_init`"),
    (lambda: tiny(SOLV, clip_length=4), ConfigError, "odd"),
    (lambda: tiny(SOLV, token_drop=1.0), ConfigError, "`token_drop`"),
    (lambda: tiny(SOLV, merge_threshold=3.0), ConfigError, "`merge_threshold`"),
    (lambda: tiny(SOLV, temporal_heads=5), ConfigError, "`temporal_heads`"),
    (lambda: tiny(SAVi)(torch.randn(2, 3, 16, 16)), ShapeError, "`video`"),
    (lambda: tiny(SAVi, slot_init="boxes").training_step({"video": VIDEO}, 0), ConfigError, "masks_in_training"),
    (lambda: tiny(SAVi, slot_init="boxes")(VIDEO), ConfigError, "`conditioning` to be a tensor"),
    (lambda: tiny(SAVi)(VIDEO, HINTS), ConfigError, "`conditioning` to be None"),
    (lambda: tiny(SAVi, slot_init="centres")(VIDEO, HINTS), ShapeError, r"`conditioning` to be \(B, 3, 2\)"),
    (lambda: tiny(SAVi).validation_step({"video": VIDEO}, 0), ConfigError, "key `segmentations`"),
    (lambda: tiny(VideoSAUR)(torch.zeros(2, 6, 6)), ShapeError, "inputs"),
    (lambda: tiny(VideoSAUR).training_step({"image": VIDEO}, 0), ConfigError, "`features` or `video`"),
    (lambda: tiny(SOLV)(window_clips(frames=5)["features"]), ShapeError, "`clip_length`"),
    (lambda: tiny(SOLV)(torch.zeros(1, 3, 9, 6)), ShapeError, "`grid`"),
    (lambda: tiny(SOLV).training_step({"frame_mask": VIDEO}, 0), ConfigError, "`features` or `video`"),
    (lambda: slot_contrast_loss(SLOTS[:, :1], ALL[:, :1]), ShapeError, r"T >= 2, .* Raise `clip_length`"),
    (lambda: slot_contrast_loss(SLOTS[0], ALL), ShapeError, "`slots`"),
    (lambda: slot_contrast_loss(SLOTS, ALL, temperature=0), ConfigError, "`temperature`"),
    (lambda: temporal_similarity(SLOTS, shift=2), ShapeError, r"T > 2, .* Raise `clip_length`"),
    (lambda: temporal_similarity(SLOTS, temperature=0), ConfigError, "`temperature`"),
    (lambda: temporal_similarity_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3), ALL), ShapeError, "target"),
    (lambda: schedule_for(math.inf, 10, "cosine"), ConfigError, "max_steps"),
    (lambda: schedule_for(-1, 100, "exponential"), ConfigError, "max_steps"),
    (lambda: schedule_for(10, 0, "linear"), ConfigError, "decay"),  # type: ignore[arg-type]
    (lambda: schedule_for(10, -1), ConfigError, "warmup_steps"),
    (lambda: exponential_for(-1, 10), ConfigError, "decay_steps"),
    (lambda: exponential_for(100, 10, decay_steps=5), ConfigError, "decay_steps"),
    (lambda: exponential_for(100, 10, rate=0), ConfigError, "decay_rate"),
    (lambda: SlotAttention(8)(torch.zeros(1, 3, 8), torch.zeros(1, 5, 8), 0), ConfigError, "iterations"),
    (lambda: SlotAttention(8)(torch.zeros(1, 3, 8), torch.zeros(1, 2, 5, 8)), ShapeError, "slots"),
    (lambda: SlotAttention(8, sharpness=0.0), ConfigError, "sharpness"),
    (lambda: SlotCorrector(8, 8, eps=0), ConfigError, "corrector_eps"),
    (lambda: init_soft_kmeans_(SlotCorrector(4, 4), float("nan")), ConfigError, "corrector_sharpness"),
    (lambda: SlotTransformer(8, blocks=1, heads=3), ConfigError, "heads"),
    (lambda: SlotTransformer(8, blocks=-1, heads=2), ConfigError, "blocks"),
    (lambda: MLPDecoder(8, 3, [], 6), ConfigError, "hidden layer"),
    (lambda: SlotMixerDecoder(8, 3, [4], 0), ConfigError, "0 patches"),
    (lambda: ConvEncoder([8], [1], kernel_size=4), ConfigError, "odd"),
    (lambda: ConvEncoder([8], [1], position_scale=-1.0), ConfigError, "position_scale"),
    (lambda: SpatialBroadcastDecoder(4, [8], [1], init="zeros"), ConfigError, "init"),  # type: ignore[arg-type]
    (lambda: SpatialBroadcastDecoder(4, [8], [1], (0, 8)), ConfigError, "decoder_broadcast"),
    (lambda: SpatialBroadcastDecoder(4, [8], [1])(torch.randn(1, 2, 4)), ShapeError, "slots"),
    (lambda: encoder_of(), ConfigError, "feature_dim"),
    (lambda: encoder_of(feature_dim=5, layer="vit_block1"), ConfigError, "only with a backbone"),
    (lambda: encoder_of(feature_dim=5, grid=(4, 0)), ConfigError, "grid"),
    (lambda: encoder_of(feature_dim=5)(torch.zeros(1, 23, 5)), ShapeError, "got 23 patches"),
    (lambda: encoder_of(feature_dim=5)(torch.zeros(1, 24, 7)), ShapeError, "7 channels"),
    (lambda: encoder_of(feature_dim=5)(torch.zeros(1, 3, 8, 8)), ConfigError, "cached `features`"),
    (lambda: first_frame_hints(torch.zeros(2, 4, 8, 8), 3), ShapeError, "segmentations"),
    (lambda: ConditionedSlots(3, 8, hint_dim=2)(torch.zeros(2, 4, 2)), ShapeError, "conditioning"),
    (lambda: tiny(VideoSAUR, slot_init_std=0), ConfigError, "slot_init_std"),
]


@pytest.mark.parametrize(("call", "error", "match"), REFUSED)
def test_refusals_by_name(call: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        call()
