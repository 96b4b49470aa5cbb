"""Configurations in the form of the public ones, written for these tests."""

from __future__ import annotations

from pathlib import Path

_TRAINING = """
experiment_group: tests
experiment_name: movi_c_small
globals: {SLOTS: SLOTS_, DIM: 8, VIT: vit_small_patch14_dinov2, FEATURES: 12, PATCHES: 9, GPUS: 2, BATCH: 4,
  TOTAL: "${mul: ${.GPUS}, ${.BATCH}}", BASE_LR: 1e-3, RENDERED: 16}
trainer: {max_steps: 5000, log_every_n_steps: 50, val_check_interval: 250, gradient_clip_val: 0.05}
optimizer:
  name: Adam
  lr: "${eval: 'a / 32 * b', ${globals.TOTAL}, ${globals.BASE_LR}}"
  lr_scheduler: {name: exp_decay_with_warmup, warmup_steps: 100, decay_steps: "${trainer.max_steps}"}
model:
"""
_PARTS = """
  initializer: {name: INIT_, n_slots: "${globals.SLOTS}", dim: "${globals.DIM}"}
  encoder:
    backbone: {name: TimmExtractor, model: "${globals.VIT}", features: [vit_block12, vit_block_keys12], frozen: true,
      pretrained: true, model_kwargs: {dynamic_img_size: True}}
    output_transform: {name: networks.two_layer_mlp, inp_dim: "${globals.FEATURES}", outp_dim: "${globals.DIM}",
      hidden_dim: "${mul: ${globals.FEATURES}, 2}", layer_norm: true}
  grouper: {name: SlotAttention, inp_dim: "${globals.DIM}", slot_dim: "${globals.DIM}", n_iters: 2, use_mlp: MLP_}
"""
_PARTS_OF_VIDEO = """
  latent_processor: {first_step_corrector_args: {n_iters: 3}}
  predictor: {name: networks.TransformerEncoder, dim: "${globals.DIM}", n_blocks: 1, n_heads: 4}
"""
_MLP_DECODER = """
  decoder: {name: MLPDecoder, inp_dim: "${globals.DIM}", outp_dim: "${globals.FEATURES}", hidden_dims: [16, 16],
    n_patches: "${globals.PATCHES}"}
"""
_MIXER = """
  decoder:
    name: SlotMixerDecoder
    inp_dim: ${globals.DIM}
    embed_dim: ${globals.DIM}
    outp_dim: "${add: ${globals.FEATURES}, ${globals.PATCHES}}"
    n_patches: ${globals.PATCHES}
    allocator: {name: TransformerEncoder, dim: "${globals.DIM}", memory_dim: "${globals.DIM}", n_blocks: 3, n_heads: 4}
    renderer: {name: MLP, inp_dim: "${globals.DIM}", outp_dim: "${globals.RENDERED}", hidden_dims: [16, 16],
      final_activation: true}
    renderer_dim: ${globals.RENDERED}
    use_layer_norms: true
    pos_embed_mode: add
"""
_METRICS = """
val_metrics:
  ari: {name: VideoARI, ignore_background: true, pred_key: decoder_masks_hard, true_key: segmentations}
  image_mbo: {name: ImageIoU, matching: overlap, ignore_background: true, video_input: true,
    pred_key: decoder_masks_hard, true_key: segmentations}
"""
_VIDEOS = """
dataset:
  train_shards: "SET_/SET_-train-{000000..000003}.tar"
  val_shards: "SET_/SET_-validation-000000.tar"
  batch_size: ${globals.BATCH}
  val_batch_size: 1
  val_size: 10
  num_workers: 3
  num_val_workers: 3
  train_pipeline:
    chunk_size: 4
    sample_one_chunk_per_video: true
    keys: [video]
    shuffle_size: 32
    transforms: {name: SET__train, type: video, input_size: 42, h_flip_prob: 0.5TRAIN_}
  val_pipeline:
    use_chunks: false
    keys: [video, segmentations]
    transforms: {name: SET__val, type: video, input_size: 42, num_classes: VAL_}
"""
_SLOTCONTRAST = """
    loss_featrec: {name: MSELoss, pred_dims: [0, "${globals.FEATURES}"]}
    loss_ss: {name: Slot_Slot_Contrastive_Loss, pred_key: processor.state, temperature: 0.1, batch_contrast: true,
      patch_inputs: false, keep_input_dim: true}"""
_SSYNC = """
    loss_grp2deccls: {name: MSECLSLoss, pred_key: dec_bd_preds, target_key: grp_bd_labels, temperature: 1.0}
    loss_dec2grpcls: {name: MSECLSLoss, pred_key: grp_nbd_preds, target_key: dec_nbd_labels, temperature: 1.0}
  loss_weights: {loss_featrec: 1.0, loss_ss: 0.5, loss_grp2deccls: 0.7, loss_dec2grpcls: 0.3}
  visualize: true
  experiment_name: ${experiment_name}
  dif_n_bd: 2
  dif_n_bd_noise: 3
  dif_n_nbd: 4
  merge_iou_threshold: 0.65
  synergistic_warmup_ratio: 0.25
  max_steps: ${trainer.max_steps}"""
_SRL = """
    loss_cl_dec: {name: DECConsLoss, pred_key: encoder.feat_recon, target_key: encoder.feat_orig_dec, train_start: 2000}
  loss_weights: {loss_featrec: 1.0, loss_ss: 0.25, loss_cl_dec: 0.1}
  projector: {name: Projector, inp_dim: "${globals.FEATURES}", outp_dim: "${globals.DIM}"}
  projector2: {name: Projector, inp_dim: "${globals.DIM}", outp_dim: "${globals.DIM}"}"""
_TIME = """
    loss_featrec: {name: MSELoss, pred_dims: [0, "${globals.FEATURES}"]}
    loss_timesim:
      name: CrossEntropyLoss
      target_key: encoder.vit_block_keys12
      remove_last_n_frames: 1
      pred_dims: ["${globals.FEATURES}", "${add: ${globals.FEATURES}, ${globals.PATCHES}}"]
      target_transform: {name: utils.FeatureTimeSimilarity, softmax: true, temperature: 0.2, threshold: 0.0}
  loss_weights: {loss_featrec: 1.0, loss_timesim: 0.1}"""
_PICTURES = """
val_metrics:
  image_ari: {name: ImageARI, ignore_overlaps: true, pred_key: decoder_masks_hard, true_key: segmentations}
dataset:
  train_shards: "coco/coco-train-{000000..000009}.tar"
  val_shards: "coco/coco-validation-000000.tar"
  batch_size: 4
  train_pipeline:
    name: image
    is_video_dataset: false
    keys: [image]
    transforms: {name: coco_train, crop_type: short_side_resize_random, type: image, input_size: 42}
  val_pipeline:
    name: image
    is_video_dataset: false
    keys: [image, segmentations]
    transforms: {name: coco_val, crop_type: central, type: image, input_size: 42, num_classes: 63}
"""


def _text(template: str, **values: str) -> str:
    for name, value in values.items():
        template = template.replace(f"{name}_", value)
    return template


def _learned(losses: str) -> str:
    video = f"{_PARTS}{_PARTS_OF_VIDEO}{_MLP_DECODER}{_METRICS}{_VIDEOS}"
    text = f"{_TRAINING}  input_type: video\n  losses:{_SLOTCONTRAST}{losses}{video}"
    return _text(text, SLOTS="11", INIT="FixedLearnedInit", MLP="true", SET="movi", TRAIN="", VAL="11")


TEXTS = {
    "slotcontrast": _learned("\n  loss_weights: {loss_featrec: 1.0, loss_ss: 0.5}"),
    "ssync": _learned(_SSYNC),
    "srl": _learned(_SRL),
    "videosaur": _text(
        f"{_TRAINING}  input_type: video\n  losses:{_TIME}{_PARTS}{_PARTS_OF_VIDEO}{_MIXER}{_METRICS}{_VIDEOS}",
        SLOTS="7",
        INIT="RandomInit",
        MLP="false",
        SET="ytvis",
        VAL="25, crop_type: central",
        TRAIN=", crop_type: short_side_resize_random, num_classes: 10",
    ),
    "dinosaur": _text(
        f"{_TRAINING}  input_type: image\n{_PARTS}{_MLP_DECODER}{_PICTURES}".replace("n_iters: 2", "n_iters: 3"),
        SLOTS="7",
        INIT="RandomInit",
        MLP="true",
    ),
}


def write_config(folder: Path, name: str, *changes: str) -> Path:
    """Write one of the configurations, with changes in its own keys."""
    from omegaconf import OmegaConf

    tree = OmegaConf.create(TEXTS[name])
    for change in changes:
        key, _, value = change.partition("=")
        OmegaConf.update(tree, key, OmegaConf.create(f"value: {value}")._get_node("value"), merge=False)
    path = folder / f"{name}.yaml"
    path.write_text(OmegaConf.to_yaml(tree, resolve=False), encoding="utf-8")
    return path
