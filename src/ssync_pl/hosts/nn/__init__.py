"""Parts of the reference hosts: encoders, slot initialisers, slot attention, predictors, decoders."""

from __future__ import annotations

from ssync_pl.hosts.nn.backbones import BackboneOutput, FrozenBackbone, load_backbone
from ssync_pl.hosts.nn.decoders import DecoderOutput, SpatialBroadcastDecoder
from ssync_pl.hosts.nn.encoders import ConvEncoder, EncoderOutput
from ssync_pl.hosts.nn.initializers import ConditionedSlots, GaussianSlots, LearnedSlots, first_frame_hints
from ssync_pl.hosts.nn.position import SoftPositionEmbedding, coordinate_grid
from ssync_pl.hosts.nn.predictors import TransformerBlock, TransformerPredictor
from ssync_pl.hosts.nn.slot_attention import SlotAttention, SlotAttentionOutput
from ssync_pl.hosts.nn.weights import init_fan_in_

__all__ = [
    "BackboneOutput",
    "ConditionedSlots",
    "ConvEncoder",
    "DecoderOutput",
    "EncoderOutput",
    "FrozenBackbone",
    "GaussianSlots",
    "LearnedSlots",
    "SlotAttention",
    "SlotAttentionOutput",
    "SoftPositionEmbedding",
    "SpatialBroadcastDecoder",
    "TransformerBlock",
    "TransformerPredictor",
    "coordinate_grid",
    "first_frame_hints",
    "init_fan_in_",
    "load_backbone",
]
