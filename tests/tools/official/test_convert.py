from __future__ import annotations

import inspect

import lightning.pytorch as L
import pytest
import yaml
from public_configs import TEXTS, write_config

from ssync_pl import SSyncCallback, hosts
from ssync_pl.data import ShardDataModule
from ssync_pl.errors import ConfigError
from ssync_pl.hosts.training import exponential_for
from ssync_pl.tools.official.convert import convert_config


@pytest.fixture
def convert(tmp_path):
    def run(name, *changes, **options):
        return convert_config(write_config(tmp_path, name, *changes), **options)

    return run


def test_slotcontrast_in_every_value(convert):
    done = convert("slotcontrast")
    assert not done.left_out
    assert done.config == {
        "seed_everything": True,
        "name": "movi_c_small",
        "trainer": {
            "max_steps": 5000,
            "max_epochs": -1,
            "val_check_interval": 250,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 50,
            "gradient_clip_val": 0.05,
            "callbacks": [
                {
                    "class_path": "ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 1000, "filename": "{step}", "save_last": True},
                }
            ],
        },
        "model": {
            "class_path": "SlotContrast",
            "init_args": {
                "num_slots": 11,
                "slot_dim": 8,
                "slot_init": "learned",
                "slot_init_std": None,
                "layer": "vit_block12",
                "backbone": "vit_small_patch14_dinov2.lvd142m",
                "backbone_weights": "pretrained",
                "encoder_hidden": 24,
                "corrector_mlp_hidden": 32,
                "corrector_eps": 1e-8,
                "iterations_first": 3,
                "iterations_later": 2,
                "predictor_blocks": 1,
                "predictor_heads": 4,
                "predictor_mlp_hidden": 32,
                "decoder": "mlp",
                "decoder_hidden": [16, 16],
                "grid": [3, 3],
                "reconstruction_weight": 1.0,
                "similarity_weight": 0.0,
                "contrast_weight": 0.5,
                "contrast_temperature": 0.1,
                "contrast_across_batch": True,
                "learning_rate": 0.00025,
                "warmup_steps": 100,
                "decay_steps": None,
                "decay_rate": 0.5,
                "has_background": True,
            },
        },
        "data": {
            "class_path": "ShardDataModule",
            "init_args": {
                "train": "movi/movi-train-{000000..000003}.tar",
                "validation": "movi/movi-validation-000000.tar",
                "batch_size": 4,
                "val_batch_size": 1,
                "num_workers": 3,
                "shuffle_buffer": 32,
                "clip_length": 4,
                "flip_probability": 0.5,
                "image_size": 42,
                "crop": "none",
                "resize_mode": "bicubic",
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
                "has_background": True,
                "mask_format": "ids",
                "max_objects": 10,
                "sampling": "reference",
            },
        },
    }


def test_videosaur_keeps_its_similarity_loss_and_its_mixer(convert):
    done = convert("videosaur")
    options, data = done.config["model"]["init_args"], done.config["data"]["init_args"]
    assert done.config["model"]["class_path"] == "VideoSAUR"
    expected = {
        "slot_init": "gaussian",
        "similarity_layer": "vit_block_keys12",
        "similarity_weight": 0.1,
        "similarity_temperature": 0.2,
        "similarity_threshold": 0.0,
        "similarity_shift": 1,
        "contrast_weight": 0.0,
        "corrector_mlp_hidden": 0,
        "decoder": "mixer",
        "decoder_hidden": [16, 16, 16],
        "mixer_blocks": 3,
        "mixer_heads": 4,
        "has_background": False,
    }
    assert {name: options[name] for name in expected} == expected
    assert (data["crop"], data["max_objects"], data["mask_format"]) == ("random", 25, "channels")


def test_similarities_alone_and_other_temperatures(convert):
    changes = (
        "model.losses.loss_featrec=null",
        "model.loss_weights={loss_timesim: 0.3}",
        "model.losses={loss_timesim: {name: CrossEntropyLoss, remove_last_n_frames: 2, pred_dims: [0, 9], "
        "target_transform: {name: utils.FeatureTimeSimilarity, softmax: true, time_shift: 2}}}",
        "model.decoder.outp_dim=9",
    )
    options = convert("videosaur", *changes).config["model"]["init_args"]
    assert (options["reconstruction_weight"], options["similarity_weight"]) == (0.0, 0.3)
    assert (options["similarity_layer"], options["similarity_temperature"]) == (None, 1.0)
    assert (options["similarity_threshold"], options["similarity_shift"]) == (None, 2)


def test_ssync_becomes_the_callback(convert):
    done = convert("ssync")
    settings = {
        "merge_threshold": 0.65,
        "n_bd": 2,
        "n_nbd": 4,
        "n_noise": 3,
        "boundary_weight": 0.7,
        "interior_weight": 0.3,
        "temperature": 1.0,
        "warmup_ratio": 0.25,
    }
    assert done.config["trainer"]["callbacks"][0] == {"class_path": "SSyncCallback", "init_args": settings}
    assert done.config["trainer"]["precision"] == "16-mixed"
    assert done.config["model"]["class_path"] == "SlotContrast"
    assert done.left_out == {"model.visualize": "the callback SSyncPictures draws pictures"}
    assert SSyncCallback(**settings).config.n_noise == 3


def test_ssyncs_warmup_counts_its_own_steps(convert):
    for change, steps in (("model.max_steps=3001", 751), ("model.max_steps=null", 25_000)):
        settings = convert("ssync", change).config["trainer"]["callbacks"][0]["init_args"]
        assert settings["warmup_steps"] == steps
        assert "warmup_ratio" not in settings


def test_ssync_is_added_and_left_out_as_asked(convert):
    names = [entry["class_path"] for entry in convert("ssync", ssync=False).config["trainer"]["callbacks"]]
    assert names == ["ModelCheckpoint"]
    assert convert("ssync", ssync=False).left_out["SSync's losses"] == "left out as asked"
    for experiment, threshold in (("movi_c", 0.7), ("my_movi_e", 0.65), ("ytvis2021", 0.6), ("coco", 0.9), ("x", 0.7)):
        added = convert("slotcontrast", f"experiment_name={experiment}", ssync=True)
        settings = added.config["trainer"]["callbacks"][0]["init_args"]
        assert settings == {"merge_threshold": threshold, "warmup_ratio": 0.3}
        assert ("SSync's merge_threshold" in added.left_out) == (experiment == "x")


def test_backbones_with_a_normalisation_of_their_own_are_named(convert):
    done = convert("slotcontrast", "globals.VIT=vit_small_patch16_224", "globals.PATCHES=4")
    assert "normalised as timm says" in done.left_out["model.encoder.backbone.model"]


def test_srl_says_what_it_loses(convert):
    done = convert("srl")
    assert set(done.left_out) == {
        "model.losses.loss_ss",
        "model.losses.loss_cl_dec",
        "model.projector",
        "model.projector2",
    }
    assert done.config["model"]["init_args"]["contrast_weight"] == 0.25


def test_images(convert):
    done = convert("dinosaur")
    assert done.config["model"]["class_path"] == "DINOSAUR"
    options, data = done.config["model"]["init_args"], done.config["data"]["init_args"]
    assert options["iterations"] == 3
    assert not {"iterations_first", "predictor_blocks", "contrast_weight"} & set(options)
    assert (data["clip_length"], data["ignore_overlaps"], data["max_objects"]) == (1, True, 63)
    assert not done.left_out


def test_single_frames_have_nothing_to_contrast(convert):
    changes = ("model.losses.loss_ss.name=Img_Slot_Slot_Contrastive_Loss", "dataset.train_pipeline.chunk_size=1")
    done = convert("slotcontrast", *changes)
    assert done.config["model"]["init_args"]["contrast_weight"] == 0.0
    assert "no gradient" in done.left_out["model.losses.loss_ss"]
    with pytest.raises(ConfigError, match="but got clips of 4 frames"):
        convert("slotcontrast", changes[0])


@pytest.mark.parametrize("name", TEXTS)
def test_all_arguments_exist_and_the_schedule_is_the_public_one(convert, name):
    config = convert(name).config
    host = getattr(hosts, config["model"]["class_path"])
    known = set(inspect.signature(host).parameters) | set(inspect.signature(hosts.VideoSAUR).parameters)
    options = config["model"]["init_args"]
    assert set(options) <= known - set(host.fixed)
    assert set(config["trainer"]) <= set(inspect.signature(L.Trainer).parameters)
    ShardDataModule(**config["data"]["init_args"])
    factor = exponential_for(5000, options["warmup_steps"], options["decay_steps"], options["decay_rate"])
    for step in (0, 1, 50, 99):
        assert factor(step) == step / 100
    for step in (100, 2550, 4999, 5000):
        assert factor(step) == pytest.approx(0.5 ** ((step - 100) / 4900))


def test_defaults_of_the_official_script(convert):
    done = convert(
        "slotcontrast", "trainer=null", "optimizer={name: Adam, lr: 1e-3}", "seed=5", "checkpoint_every_n_steps=7"
    )
    trainer, options = done.config["trainer"], done.config["model"]["init_args"]
    assert (trainer["max_steps"], trainer["val_check_interval"], trainer["log_every_n_steps"]) == (100_000, 5000, 100)
    assert (options["warmup_steps"], options["decay_rate"]) == (0, 1.0)
    assert done.config["seed_everything"] == done.config["data"]["init_args"]["seed"] == 5
    assert trainer["callbacks"][0]["init_args"]["every_n_train_steps"] == 7
    schedule = "optimizer={name: Adam, lr: 1e-3, lr_scheduler: {name: exp_decay_with_warmup}}"
    options = convert("slotcontrast", schedule).config["model"]["init_args"]
    assert (options["warmup_steps"], options["decay_steps"], options["decay_rate"]) == (1000, 100_000, 0.5)


def test_shards_go_below_a_root(convert):
    shards = "dataset.train_shards=['a-{0..1}.tar', b.tar]"
    data = convert("slotcontrast", shards, root="https://host/sets/").config["data"]["init_args"]
    assert data["train"] == ["https://host/sets/a-{0..1}.tar", "https://host/sets/b.tar"]
    assert (
        convert("slotcontrast", "dataset.train_shards=/a.tar", root="b").config["data"]["init_args"]["train"]
        == "/a.tar"
    )


def test_what_has_no_counterpart_is_listed(convert):
    done = convert(
        "videosaur",
        "dataset.val_pipeline.use_chunks=true",
        "dataset.val_pipeline.transforms.mask_size=20",
        "dataset.num_val_workers=1",
        "trainer.find_unused_parameters=true",
        "trainer.max_epochs=3",
        "wandb={project: mine}",
        "model.load_weights=old.ckpt",
    )
    assert set(done.left_out) == {
        "dataset.val_pipeline.use_chunks",
        "dataset.val_pipeline.transforms.mask_size",
        "dataset.num_val_workers",
        "trainer.find_unused_parameters",
        "trainer.max_epochs",
        "wandb",
        "model.load_weights",
    }
    text = done.to_yaml()
    assert yaml.safe_load(text) == done.config
    assert all(f"#   {key}: {reason}" in text for key, reason in done.left_out.items())
    assert "grid: [3, 3]" in text


def test_unknown_keys_that_could_matter_are_refused_unless_ignored(convert):
    changes = ("model.grouper.gate=true", "dataset.mixup=0.3", "optimizer.weight_decay=0.1")
    with pytest.raises(ConfigError, match=r"dataset\.mixup, model\.grouper\.gate, optimizer\.weight_decay"):
        convert("slotcontrast", *changes)
    done = convert("slotcontrast", *changes, ignore=["model.*", "dataset.mixup", "optimizer.weight_decay"])
    assert done.left_out["model.grouper.gate"] == "ignored as asked"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("slotcontrast", "model.decoder.name=SpatialBroadcastDecoder", "The host SAVi"),
        ("slotcontrast", "model.target_type=input", "rebuild features"),
        ("slotcontrast", "model.target_encoder={name: FrameEncoder}", "features that they attend to"),
        ("slotcontrast", "model.grouper.use_gru=false", "with a GRU"),
        (
            "slotcontrast",
            "model.grouper.inp_dim=6",
            "Expected model.grouper.inp_dim to be 8 as its neighbour, but got 6",
        ),
        ("slotcontrast", "model.encoder.backbone.frozen=false", "are frozen"),
        ("slotcontrast", "model.encoder.backbone.name=CNNEncoder", "frozen models of timm"),
        ("slotcontrast", "model.encoder.output_transform.layer_norm=false", "layer_norm to be true"),
        ("slotcontrast", "model.encoder.output_transform=null", "a two-layer MLP, but got none"),
        ("slotcontrast", "model.encoder.main_features_key=vit_block9", "to hold 'vit_block9'"),
        ("slotcontrast", "model.predictor.dropout=0.1", "without dropout"),
        ("slotcontrast", "model.predictor.initial_residual_scale=0.1", "without dropout"),
        ("slotcontrast", "model.decoder.outp_dim=21", "to be 12, the channels that the losses read, but got 21"),
        ("slotcontrast", "globals.PATCHES=8", "a square number, but got 8"),
        ("slotcontrast", "globals.PATCHES=16", "to be 9, the patches of vit_small_patch14_dinov2"),
        ("slotcontrast", "model.losses.loss_ss.name=NLLLoss", "Set its weight in model.loss_weights to 0"),
        ("slotcontrast", "model.losses.loss_ss.pred_key=decoder.masks", "that slot attention returns"),
        ("slotcontrast", "model.loss_weights={loss_ss: 1}", "Expected model.loss_weights to name the losses"),
        ("slotcontrast", "model.losses.loss_featrec.pred_dims=[0, 6]", "leading channels"),
        ("slotcontrast", "optimizer.name=SGD", "train with Adam"),
        ("slotcontrast", "optimizer.lr=fast", "Expected optimizer.lr to be a number, but got 'fast'"),
        ("slotcontrast", "optimizer.param_groups=[{modules: encoder}]", "one learning rate"),
        ("slotcontrast", "optimizer.lr_scheduler.name=cosine_decay_with_warmup", "decay exponentially"),
        ("slotcontrast", "dataset.train_pipeline.transforms.crop_type=random", "has no such crop"),
        ("slotcontrast", "dataset.train_pipeline.transforms.crop_type=central", "to crop like training"),
        (
            "slotcontrast",
            "dataset.train_pipeline.transforms.input_size=70",
            "one input_size in training and validation",
        ),
        ("slotcontrast", "dataset.val_pipeline.transforms.name=dummy_val", "one name in training and validation"),
        ("slotcontrast", "dataset.name=DummyDataModule", "reads tar shards"),
        ("slotcontrast", "val_metrics.ari.pred_key=grouping_masks_hard", "scores decoder masks"),
        ("slotcontrast", "val_metrics.ari.ignore_overlaps=true", "the same in all metrics"),
        ("slotcontrast", "trainer.max_steps=many", "a whole number, but got 'many'"),
        ("slotcontrast", "model=null", "but model is missing"),
        ("slotcontrast", "model.grouper=3", "Expected model.grouper to be a mapping, but got 3"),
        ("ssync", "model.losses.loss_grp2deccls.target_key=dec_nbd_labels", "as SSync does"),
        ("ssync", "model.losses.loss_grp2deccls.temperature=2.0", "one temperature"),
        ("videosaur", "model.decoder.pos_embed_mode=concat", "add the position"),
        ("videosaur", "model.decoder.use_layer_norms=false", "layer norms"),
        ("videosaur", "model.decoder.allocator.hidden_dim=8", "to be 32, but got 8"),
        ("videosaur", "model.losses.loss_timesim.target_transform.softmax=false", "similarities over time"),
        ("videosaur", "model.losses.loss_timesim.remove_last_n_frames=2", "similarities over time"),
        ("videosaur", "model.losses.loss_timesim.target_key=video", "a layer of the encoder"),
        ("dinosaur", "model.losses={a: {name: MSELoss}}\nmodel.loss_weights={a: 2.0}", "DINOSAUR has no others"),
    ],
)
def test_what_would_train_something_else_is_refused(convert, name, change, message):
    with pytest.raises(ConfigError, match=message):
        convert(name, *change.split("\n"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=.inf", "seed to be a whole number, but got inf"),
        ("seed=.nan", "seed to be a whole number, but got nan"),
        ("optimizer.lr=.nan", "optimizer.lr to be a number, but got nan"),
        ("model.encoder.backbone.features=3", "features to be names of layers, but got 3"),
    ],
)
def test_numbers_and_names_that_are_none(convert, change, message):
    with pytest.raises(ConfigError, match=message):
        convert("slotcontrast", change)
