"""Parts of the reference hosts: encoders, slot initialisers, slot attention, predictors, decoders."""

from __future__ import annotations

from ssync_pl.hosts.nn.backbones import BackboneOutput, FrozenBackbone, load_backbone
from ssync_pl.hosts.nn.corrector import SlotCorrector
from ssync_pl.hosts.nn.decoders import DecoderOutput, SpatialBroadcastDecoder
from ssync_pl.hosts.nn.encoders import ConvEncoder, EncoderOutput
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder, build_feature_encoder
from ssync_pl.hosts.nn.initializers import ConditionedSlots, GaussianSlots, LearnedSlots, first_frame_hints
from ssync_pl.hosts.nn.mlp import MLP
from ssync_pl.hosts.nn.over_time import MapOverTime, ScanOverTime, SlotProcessor
from ssync_pl.hosts.nn.patch_decoders import MLPDecoder, SlotMixerDecoder
from ssync_pl.hosts.nn.position import PatchPosition, SoftPositionEmbedding, coordinate_grid
from ssync_pl.hosts.nn.predictors import TransformerBlock, TransformerPredictor
from ssync_pl.hosts.nn.slot_attention import SlotAttention, SlotAttentionOutput
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer, SlotTransformerBlock
from ssync_pl.hosts.nn.soft_kmeans import init_soft_kmeans_
from ssync_pl.hosts.nn.weights import init_fan_in_

__all__ = [
    "MLP",
    "BackboneOutput",
    "ConditionedSlots",
    "ConvEncoder",
    "DecoderOutput",
    "EncoderOutput",
    "FeatureEncoder",
    "FrozenBackbone",
    "GaussianSlots",
    "LearnedSlots",
    "MLPDecoder",
    "MapOverTime",
    "PatchPosition",
    "ScanOverTime",
    "SlotAttention",
    "SlotAttentionOutput",
    "SlotCorrector",
    "SlotMixerDecoder",
    "SlotProcessor",
    "SlotTransformer",
    "SlotTransformerBlock",
    "SoftPositionEmbedding",
    "SpatialBroadcastDecoder",
    "TransformerBlock",
    "TransformerPredictor",
    "build_feature_encoder",
    "coordinate_grid",
    "first_frame_hints",
    "init_fan_in_",
    "init_soft_kmeans_",
    "load_backbone",
]
