import pytest

SLOTCONTRAST = """
experiment_name: movi_c_small
globals: {SLOTS: 11, DIM: 8, VIT: vit_small_patch14_dinov2, FEATURES: 12, PATCHES: 9, GPUS: 2, BATCH: 4,
  TOTAL: "${mul: ${.GPUS}, ${.BATCH}}", BASE_LR: 1e-3, RENDERED: 16}
trainer: {max_steps: 5000, log_every_n_steps: 50, val_check_interval: 250, gradient_clip_val: 0.05}
optimizer: {name: Adam, lr: "${eval: 'a / 32 * b', ${globals.TOTAL}, ${globals.BASE_LR}}",
  lr_scheduler: {name: exp_decay_with_warmup, warmup_steps: 100, decay_steps: "${trainer.max_steps}"}}
model:
  input_type: video
  losses:
    loss_featrec: {name: MSELoss, pred_dims: [0, "${globals.FEATURES}"]}
    loss_ss: {name: Slot_Slot_Contrastive_Loss, pred_key: processor.state, temperature: 0.1, batch_contrast: true,
      patch_inputs: false, keep_input_dim: true}
  loss_weights: {loss_featrec: 1.0, loss_ss: 0.5}
  initializer: {name: FixedLearnedInit, n_slots: "${globals.SLOTS}", dim: "${globals.DIM}"}
  encoder:
    backbone: {name: TimmExtractor, model: "${globals.VIT}", features: [vit_block12, vit_block_keys12], frozen: true,
      pretrained: true, model_kwargs: {dynamic_img_size: True}}
    output_transform: {name: networks.two_layer_mlp, inp_dim: "${globals.FEATURES}", outp_dim: "${globals.DIM}",
      hidden_dim: "${mul: ${globals.FEATURES}, 2}", layer_norm: true}
  grouper: {name: SlotAttention, inp_dim: "${globals.DIM}", slot_dim: "${globals.DIM}", n_iters: 2, use_mlp: true}
  latent_processor: {first_step_corrector_args: {n_iters: 3}}
  predictor: {name: networks.TransformerEncoder, dim: "${globals.DIM}", n_blocks: 1, n_heads: 4}
  decoder: {name: MLPDecoder, inp_dim: "${globals.DIM}", outp_dim: "${globals.FEATURES}", hidden_dims: [16, 16],
    n_patches: "${globals.PATCHES}"}
val_metrics:
  ari: {name: VideoARI, ignore_background: true, pred_key: decoder_masks_hard, true_key: segmentations}
  image_mbo: {name: ImageIoU, matching: overlap, pred_key: decoder_masks_hard, true_key: segmentations}
dataset:
  train_shards: "movi/movi-train-{000000..000003}.tar"
  val_shards: "movi/movi-validation-000000.tar"
  batch_size: ${globals.BATCH}
  val_batch_size: 1
  num_workers: 3
  train_pipeline: {chunk_size: 4, sample_one_chunk_per_video: true, keys: [video], shuffle_size: 32,
    transforms: {name: movi_train, type: video, input_size: 42, h_flip_prob: 0.5}}
  val_pipeline: {use_chunks: false, keys: [video, segmentations],
    transforms: {name: movi_val, type: video, input_size: 42, num_classes: 11}}
"""
# What the others have instead; null takes a key away.
OVERLAYS = {
    "slotcontrast": "{}",
    "ssync": """
model: {visualize: true, experiment_name: "${experiment_name}", dif_n_bd: 2, dif_n_bd_noise: 3, dif_n_nbd: 4,
  merge_iou_threshold: 0.65, synergistic_warmup_ratio: 0.25, max_steps: "${trainer.max_steps}",
  loss_weights: {loss_grp2deccls: 0.7, loss_dec2grpcls: 0.3},
  losses: {loss_grp2deccls: {name: MSECLSLoss, pred_key: dec_bd_preds, target_key: grp_bd_labels, temperature: 1.0},
    loss_dec2grpcls: {name: MSECLSLoss, pred_key: grp_nbd_preds, target_key: dec_nbd_labels, temperature: 1.0}}}
""",
    "videosaur": """
globals: {SLOTS: 7}
model:
  losses:
    loss_ss: null
    loss_timesim: {name: CrossEntropyLoss, target_key: encoder.vit_block_keys12, remove_last_n_frames: 1,
      pred_dims: ["${globals.FEATURES}", "${add: ${globals.FEATURES}, ${globals.PATCHES}}"],
      target_transform: {name: utils.FeatureTimeSimilarity, softmax: true, temperature: 0.2, threshold: 0.0}}
  loss_weights: {loss_ss: null, loss_timesim: 0.1}
  initializer: {name: RandomInit}
  grouper: {use_mlp: false}
  decoder:
    {name: SlotMixerDecoder, hidden_dims: null, embed_dim: "${globals.DIM}", use_layer_norms: true, pos_embed_mode: add,
    outp_dim: "${add: ${globals.FEATURES}, ${globals.PATCHES}}", renderer_dim: "${globals.RENDERED}",
    allocator: {name: TransformerEncoder, dim: "${globals.DIM}", memory_dim: "${globals.DIM}", n_blocks: 3, n_heads: 4},
    renderer: {name: MLP, inp_dim: "${globals.DIM}", outp_dim: "${globals.RENDERED}", hidden_dims: [16, 16],
      final_activation: true}}
dataset:
  train_pipeline: {transforms: {name: ytvis_train, crop_type: short_side_resize_random, num_classes: 10}}
  val_pipeline: {transforms: {name: ytvis_val, crop_type: central, num_classes: 25}}
""",
    "dinosaur": """
globals: {SLOTS: 7}
model: {input_type: image, losses: null, loss_weights: null, initializer: {name: RandomInit}, grouper: {n_iters: 3},
  latent_processor: null, predictor: null}
val_metrics: {ari: null, image_mbo: {ignore_overlaps: true}}
dataset:
  train_pipeline: {name: image, is_video_dataset: false, chunk_size: null, sample_one_chunk_per_video: null,
    keys: [image], transforms: {name: coco_train, crop_type: short_side_resize_random, type: image}}
  val_pipeline: {name: image, is_video_dataset: false, use_chunks: null, keys: [image, segmentations],
    transforms: {name: coco_val, crop_type: central, type: image, num_classes: 63}}
""",
}


@pytest.fixture
def public(tmp_path):
    """A function that writes one of the configurations, with changes in its own keys, and returns its path."""
    omega = pytest.importorskip("omegaconf").OmegaConf

    def write(name, *changes):
        tree = omega.merge(omega.create(SLOTCONTRAST), omega.create(OVERLAYS[name]))
        for change in changes:
            key, _, value = change.partition("=")
            omega.update(tree, key, omega.create(f"value: {value}")._get_node("value"), merge=False)
        path = tmp_path / f"{name}.yaml"
        path.write_text(omega.to_yaml(tree, resolve=False), encoding="utf-8")
        return path

    return write
