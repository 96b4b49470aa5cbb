import pytest
import yaml

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.convert import convert_config


@pytest.fixture
def convert(public):
    return lambda name, *changes, **options: convert_config(public(name, *changes), **options)


SLOTCONTRAST = """
seed_everything: true
name: movi_c_small
trainer:
  max_steps: 5000
  max_epochs: -1
  val_check_interval: 250
  check_val_every_n_epoch: null
  log_every_n_steps: 50
  gradient_clip_val: 0.05
  callbacks:
  - {class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1000, filename: "{step}", save_last: true}}
model:
  class_path: SlotContrast
  init_args:
    {num_slots: 11, slot_dim: 8, slot_init: learned, slot_init_std: null, layer: vit_block12,
    backbone: vit_small_patch14_dinov2.lvd142m, backbone_weights: pretrained, encoder_hidden: 24,
    corrector_mlp_hidden: 32, corrector_eps: 1.0e-8, iterations_first: 3, iterations_later: 2, predictor_blocks: 1,
    predictor_heads: 4, predictor_mlp_hidden: 32, decoder: mlp, decoder_hidden: [16, 16], grid: [3, 3],
    reconstruction_weight: 1.0, similarity_weight: 0.0, contrast_weight: 0.5, contrast_temperature: 0.1,
    contrast_across_batch: true, learning_rate: 0.00025, warmup_steps: 100, decay_steps: null, decay_rate: 0.5,
    has_background: true}
data:
  class_path: ShardDataModule
  init_args:
    {train: "movi/movi-train-{000000..000003}.tar", validation: movi/movi-validation-000000.tar, batch_size: 4,
    val_batch_size: 1, num_workers: 3, shuffle_buffer: 32, clip_length: 4, flip_probability: 0.5, image_size: 42,
    crop: none, resize_mode: bicubic, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], has_background: true,
    mask_format: ids, max_objects: 10, sampling: reference}
"""
CONVERTED = """
- name: videosaur
  model: {class_path: VideoSAUR, slot_init: gaussian, similarity_layer: vit_block_keys12, similarity_weight: 0.1,
    similarity_temperature: 0.2, similarity_threshold: 0.0, similarity_shift: 1, contrast_weight: 0.0,
    corrector_mlp_hidden: 0, decoder: mixer, decoder_hidden: [16, 16, 16], mixer_blocks: 3, mixer_heads: 4,
    has_background: false}
  data: {crop: random, max_objects: 25, mask_format: channels}
- name: videosaur
  changes:
  - model.losses.loss_featrec=null
  - "model.loss_weights={loss_timesim: 0.3}"
  - model.losses.loss_timesim.pred_dims=[0, 9]
  - model.decoder.outp_dim=9
  model: {reconstruction_weight: 0.0, similarity_weight: 0.3, class_path: VideoSAUR}
- name: ssync
  model: {class_path: SlotContrast}
  trainer: {precision: 16-mixed}
  callback: {merge_threshold: 0.65, n_bd: 2, n_nbd: 4, n_noise: 3, boundary_weight: 0.7, interior_weight: 0.3,
    temperature: 1.0, warmup_ratio: 0.25, warmup_steps: absent}
  left_out: {model.visualize: SSyncPictures}
- name: ssync
  changes: [model.max_steps=3001]  # SSync's warm-up counts its own steps
  callback: {warmup_steps: 751, warmup_ratio: absent}
  left_out: {model.visualize: SSyncPictures}
- name: dinosaur
  model: {class_path: DINOSAUR, iterations: 3, iterations_first: absent, predictor_blocks: absent,
    contrast_weight: absent}
  data: {clip_length: 1, ignore_overlaps: true, max_objects: 63}
- name: slotcontrast
  changes: [globals.VIT=vit_small_patch16_224, globals.PATCHES=4]
  model: {backbone_renormalize: false}
- name: slotcontrast
  changes: [model.losses.loss_ss.name=Img_Slot_Slot_Contrastive_Loss, dataset.train_pipeline.chunk_size=1]
  model: {contrast_weight: 0.0}
  left_out: {model.losses.loss_ss: no gradient}
- name: slotcontrast
  changes: [trainer=null, "optimizer.lr_scheduler={name: exp_decay_with_warmup}", checkpoint_every_n_steps=7]
  trainer: {max_steps: 100000, val_check_interval: 5000, log_every_n_steps: 100}
  model: {warmup_steps: 1000, decay_steps: null, decay_rate: 0.5}
  callback: {every_n_train_steps: 7}
- {name: slotcontrast, changes: [trainer.max_steps=7], model: {decay_steps: null}, trainer: {max_steps: 7}}
"""


@pytest.mark.parametrize("case", yaml.safe_load(CONVERTED))
def test_what_the_others_become(convert, case):
    done = convert(case["name"], *case.get("changes", ()))
    found = {part: {**done.config[part], **done.config[part]["init_args"]} for part in ("model", "data")}
    found |= {"trainer": done.config["trainer"], "callback": done.config["trainer"]["callbacks"][0]["init_args"]}
    for part in found.keys() & case.keys():
        assert {key: found[part].get(key, "absent") for key in case[part]} == case[part]
    left_out = case.get("left_out", {})
    assert done.left_out.keys() == left_out.keys()
    assert all(word in done.left_out[key] for key, word in left_out.items())


def test_slotcontrast_in_every_value(convert):
    done = convert("slotcontrast")
    assert not done.left_out
    assert done.config == yaml.safe_load(SLOTCONTRAST)
    done = convert("slotcontrast", "dataset.train_shards=['a-{0..1}.tar', /b.tar]", root="https://host/s/")
    assert done.config["data"]["init_args"]["train"] == ["https://host/s/a-{0..1}.tar", "/b.tar"]


def test_what_has_no_counterpart_is_listed(convert):
    expected = {
        "dataset.val_pipeline.use_chunks": "true",
        "dataset.val_pipeline.transforms.mask_size": "20",
        "trainer.max_epochs": "3",
        "seed": "5",
        "trainer.amp": "true",
        "wandb.project": "mine",
        "model.load_weights": "old.ckpt",
    }
    done = convert("videosaur", *map("=".join, expected.items()))
    assert done.left_out.keys() == expected.keys()
    text = done.to_yaml()
    assert yaml.safe_load(text) == done.config
    assert all(f"#   {key}: {reason}" in text for key, reason in done.left_out.items())
    assert "grid: [3, 3]" in text


def test_unknown_keys_that_could_matter_are_refused_until_they_are_null(convert):
    changes = ("model.grouper.gate=true", "dataset.mixup=0.3", "optimizer.weight_decay=0.1")
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay, model.grouper.gate, dataset.mixup.*decay=null"):
        convert("slotcontrast", *changes)
    convert("slotcontrast", *changes, *(f"{change.partition('=')[0]}=null" for change in changes))


REFUSED = """
slotcontrast | model.decoder.name=SpatialBroadcastDecoder        | model.decoder.name
slotcontrast | model.grouper.inp_dim=6                           | model.grouper.inp_dim to be 8
slotcontrast | model.grouper.n_iters=2.5                         | whole number
slotcontrast | model.encoder.backbone.frozen=false               | frozen
slotcontrast | model.decoder.outp_dim=21                         | outp_dim to be 12
slotcontrast | globals.PATCHES=8                                 | a square number
slotcontrast | model.loss_weights={loss_ss: 1}                   | loss_weights to name the losses
slotcontrast | optimizer.lr=.nan                                 | optimizer.lr to be a number
slotcontrast | dataset.train_pipeline.transforms.crop_type=central | to agree
slotcontrast | val_metrics.ari.pred_key=grouping_masks_hard      | decoder_masks_hard
slotcontrast | val_metrics.ari.ignore_overlaps=true              | the same in all metrics
slotcontrast | model=null                                        | got no model
slotcontrast | model.losses.loss_ss.name=Img_Slot_Slot_Contrastive_Loss | but got 4 frames
ssync        | model.losses.loss_grp2deccls.target_key=dec_nbd_labels | target_key
ssync        | model.losses.loss_grp2deccls.temperature=2.0      | one temperature
videosaur    | model.decoder.use_layer_norms=null                | use_layer_norms
videosaur    | model.decoder.allocator.hidden_dim=8              | got model.decoder.allocator.hidden_dim
videosaur    | model.losses.loss_timesim.target_transform.softmax=false | softmax
videosaur    | model.losses.second={name: MSELoss} ; model.loss_weights.second=1 | a second
dinosaur     | model.losses={a: {name: MSELoss, pred_dims: [0,12]}} ; model.loss_weights={a: 2} | DINOSAUR has no others
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_would_train_something_else_is_refused(convert, line):
    name, changes, message = (part.strip() for part in line.split(" | "))
    with pytest.raises(ConfigError, match=message):
        convert(name, *changes.split(" ; "))
