"""Parts of the hosts: encoders, first slots, slot attention, transformer, decoders."""

from __future__ import annotations

from ssync_pl.hosts.nn.backbones import BackboneOutput, FrozenBackbone, load_backbone
from ssync_pl.hosts.nn.decoders import MLPDecoder, SlotMixerDecoder
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.hosts.nn.initializers import ConditionedSlots, GaussianSlots, LearnedSlots
from ssync_pl.hosts.nn.pixels import ConvEncoder, SpatialBroadcastDecoder
from ssync_pl.hosts.nn.slot_attention import SlotAttention, SlotAttentionOutput, SlotCorrector
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer

__all__ = [
    "BackboneOutput",
    "ConditionedSlots",
    "ConvEncoder",
    "FeatureEncoder",
    "FrozenBackbone",
    "GaussianSlots",
    "LearnedSlots",
    "MLPDecoder",
    "SlotAttention",
    "SlotAttentionOutput",
    "SlotCorrector",
    "SlotMixerDecoder",
    "SlotTransformer",
    "SpatialBroadcastDecoder",
    "load_backbone",
]
