"""Public configurations of the VideoSAUR family as configurations of `ssync-pl fit`."""

import inspect
import math
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssync_pl.errors import require
from ssync_pl.tools.official.reading import Keys, read_config

_CROPS = {None: "none", "central": "center", "short_side_resize_random": "random"}
_TRAIN, _VAL = "dataset.train_pipeline", "dataset.val_pipeline"
_UNREAD = "the official code does not read it"
# Without a reason: the data module counts videos itself, training reads no masks, and hosts say what they read.
_LEFT_OUT = {
    **dict.fromkeys(("experiment_group", "globals.*", "val_metrics.*", "dataset.val_size", "dataset.*.keys"), ""),
    **dict.fromkeys(("dataset.num_val_workers", f"{_TRAIN}.video_size", f"{_TRAIN}.transforms.num_classes"), ""),
    "seed": "give --seed_everything and --data.seed",
    "dataset.*.transforms.resize_*": _UNREAD,
    "dataset.*.transforms.crop_size": _UNREAD,
    "dataset.*.transforms.mask_size": "masks are scored at the size of the frames",
    "trainer.*_epoch*": "training ends by steps, as in the official script",
    "model.visualize_every_n_steps": "",
    "model.experiment_*": "",
    "model.encoder.backbone.model_kwargs.dynamic_img_size": "",  # hosts take any size
    "model.load_weights": "name that file by --ckpt_path",
}
# Keys that have to be there, with the values of which the hosts have a counterpart, by the parts that have them.
_ALWAYS: dict[str, tuple[Any, ...]] = {
    "initializer.name": ("RandomInit", "FixedLearnedInit"),
    "encoder.backbone.name": ("TimmExtractor",),
    "encoder.backbone.frozen": (True,),
    "encoder.output_transform.name": ("networks.two_layer_mlp",),
    "encoder.output_transform.layer_norm": (True,),
    "grouper.name": ("SlotAttention",),
    "decoder.name": ("MLPDecoder", "SlotMixerDecoder"),
}
_TRANSFORMER = ("TransformerEncoder", "networks.TransformerEncoder")
_MIXER: dict[str, tuple[Any, ...]] = {
    "decoder.allocator.name": _TRANSFORMER,
    "decoder.renderer.name": ("MLP", "networks.MLP"),
    "decoder.renderer.final_activation": (True,),
    "decoder.use_layer_norms": (True,),
    "decoder.pos_embed_mode": ("add",),
}
_SLOT_WIDTHS = ("encoder.output_transform.outp_dim", "grouper.inp_dim", "grouper.slot_dim", "decoder.inp_dim")
_MIXER_WIDTHS = ("embed_dim", "allocator.dim", "allocator.memory_dim", "renderer.inp_dim")
_TAGS = {"dino": "dino", "mae": "mae", "dinov2": "lvd142m"}
_CONTRAST, _IMAGE_CONTRAST = "Slot_Slot_Contrastive_Loss", "Img_Slot_Slot_Contrastive_Loss"
_KINDS = {"MSELoss": "reconstruction", "CrossEntropyLoss": "similarity", "MSECLSLoss": "ssync"}
_KINDS |= dict.fromkeys((_CONTRAST, _IMAGE_CONTRAST), "contrast")
# What SSync's losses compare, and the weight of its settings
_SIDES = {"dec_bd_preds": ("grp_bd_labels", "boundary_weight"), "grp_nbd_preds": ("dec_nbd_labels", "interior_weight")}


class ConvertedConfig(NamedTuple):
    """A configuration for `ssync-pl fit`, the reasons why parts are left out, and the name of the official file."""

    config: dict[str, Any]
    left_out: dict[str, str]
    source: str

    def to_yaml(self) -> str:
        """Returns YAML; what was left out stands above it as comments."""
        lines = [f"# Converted from {self.source}."]
        if self.left_out:
            lines += ["# Not converted:", *(f"#   {key}: {reason}" for key, reason in self.left_out.items())]
        body = yaml.safe_dump(self.config, sort_keys=False, default_flow_style=None, width=120)
        return "\n".join(lines) + "\n" + body


def convert_config(path: str | Path, *, root: str | None = None, changes: Iterable[str] = ()) -> ConvertedConfig:
    """Translates an official configuration of VideoSAUR, SlotContrast or SSync; refuses parts without a counterpart.

    Shards lie below `root`, where one is given. `changes` are `KEY=VALUE` in the file's own keys, put in before.
    """
    keys = Keys(read_config(path, changes))
    for part in ("model", "optimizer", "dataset"):
        require(bool(keys.below(part)), f"{path} to have the sections model, optimizer and dataset", f"no {part}")
    keys.leave_out(_LEFT_OUT)
    name, max_steps = str(keys.take("experiment_name", Path(path).stem)), keys.integer("trainer.max_steps", 100_000)
    data = _data(keys, root)
    host, options, ssync = _model(keys, max_steps, data["clip_length"])
    keys.choose("optimizer.name", "Adam")
    keys.choose("optimizer.lr_scheduler.name", "exp_decay_with_warmup")
    decay_steps = keys.integer("optimizer.lr_scheduler.decay_steps", 100_000)
    options |= {
        "learning_rate": keys.number("optimizer.lr"),
        "warmup_steps": keys.integer("optimizer.lr_scheduler.warmup_steps", 1_000),
        # Tied to the length of the training in the public files, so that it follows when a user changes that.
        "decay_steps": None if decay_steps == max_steps else decay_steps,
        "decay_rate": keys.number("optimizer.lr_scheduler.decay_rate", 0.5),
        "has_background": data["has_background"],
    }
    every = keys.integer("checkpoint_every_n_steps", 1_000)
    checkpoints = {"every_n_train_steps": every, "filename": "{step}", "save_last": True}
    callbacks = [{"class_path": "ModelCheckpoint", "init_args": checkpoints}]
    trainer = _trainer(keys, max_steps)
    if ssync is not None:
        callbacks.insert(0, {"class_path": "SSyncCallback", "init_args": ssync})
        trainer.setdefault("precision", "16-mixed")  # as SSync's script trains
    keys.refuse_unread("model", "optimizer", "dataset")
    config = {
        "seed_everything": True,
        "name": name,
        "trainer": trainer | {"callbacks": callbacks},
        "model": {"class_path": host, "init_args": options},
        "data": {"class_path": "ShardDataModule", "init_args": data},
    }
    return ConvertedConfig(config, keys.left_out, Path(path).name)


def _trainer(keys: Keys, max_steps: int) -> dict[str, Any]:
    """Arguments of Lightning's Trainer, with the official script's own defaults."""
    import lightning.pytorch as L

    known = inspect.signature(L.Trainer.__init__).parameters
    names = [name for name in keys.below("trainer") if name in known and f"trainer.{name}" not in keys.left_out]
    return {name: keys.take(f"trainer.{name}") for name in names} | {
        "max_steps": max_steps,
        "max_epochs": -1,
        "val_check_interval": keys.take("trainer.val_check_interval", 5_000),
        "check_val_every_n_epoch": None,
        "log_every_n_steps": keys.integer("trainer.log_every_n_steps", 100),
    }


def _data(keys: Keys, root: str | None) -> dict[str, Any]:
    """Arguments of `ShardDataModule`."""
    keys.choose("dataset.name", "WebdatasetDataModule", default="WebdatasetDataModule")
    options: dict[str, Any] = {}
    for theirs, ours in (("train_shards", "train"), ("val_shards", "validation"), ("test_shards", "test")):
        shards = keys.take(f"dataset.{theirs}", None)
        if shards is not None:
            listed = shards if isinstance(shards, list) else [shards]
            rooted = [posixpath.join(root or "", str(one)) for one in listed]
            options[ours] = rooted if isinstance(shards, list) else rooted[0]
    options["batch_size"] = keys.integer("dataset.batch_size", 32)
    options["val_batch_size"] = keys.integer("dataset.val_batch_size", options["batch_size"])
    options["num_workers"] = keys.integer("dataset.num_workers", 0)
    metrics = [f"val_metrics.{name}" for name in keys.below("val_metrics")]
    for metric in metrics:  # every evaluation logs these
        keys.choose(f"{metric}.name", "VideoARI", "ImageARI", "VideoIoU", "ImageIoU")
        keys.choose(f"{metric}.pred_key", "decoder_masks_hard")
    # Without it the official metrics refuse overlapping masks, so that there is nothing to ignore where they run.
    if any(ignored := [keys.take(f"{metric}.ignore_overlaps", False) for metric in metrics]):
        require(all(ignored), "ignore_overlaps to be the same in all metrics", ignored, advice="Make it so.")
        options["ignore_overlaps"] = True
    return options | _clips(keys) | _pictures(keys) | {"sampling": "reference"}


def _clips(keys: Keys) -> dict[str, Any]:
    """Length and number of the training's clips."""
    kind = keys.choose(f"{_TRAIN}.name", "video", "image", default="video")
    keys.choose(f"{_VAL}.name", kind, default="video")
    for pipeline in (_TRAIN, _VAL):
        keys.choose(f"{pipeline}.transforms.type", kind)
    if kind == "image":
        for pipeline in (_TRAIN, _VAL):
            keys.choose(f"{pipeline}.is_video_dataset", False)
        return {"shuffle_buffer": keys.integer(f"{_TRAIN}.shuffle_size", 1000), "clip_length": 1}
    keys.choose(f"{_TRAIN}.sample_one_chunk_per_video", True)
    length = keys.take(f"{_VAL}.chunk_size", 6)
    if keys.take(f"{_VAL}.use_chunks", True):
        reason = f"validation scores whole videos instead of clips of {length} frames, so video metrics differ"
        keys.left_out[f"{_VAL}.use_chunks"] = reason
    shuffle, clip = keys.integer(f"{_TRAIN}.shuffle_size", 100), keys.integer(f"{_TRAIN}.chunk_size", 6)
    return {"shuffle_buffer": shuffle, "clip_length": clip}


def _pictures(keys: Keys) -> dict[str, Any]:
    """Size, crop and normalisation of the frames, and the form of the masks."""
    train, val = f"{_TRAIN}.transforms", f"{_VAL}.transforms"
    kind, _, _ = str(keys.take(f"{train}.name")).partition("_")
    keys.choose(f"{train}.name", *(f"{known}_train" for known in ("movi", "ytvis", "davis", "coco")))
    keys.choose(f"{val}.name", f"{kind}_val")
    size = keys.take(f"{train}.input_size")
    keys.choose(f"{val}.input_size", size)
    crop = _CROPS[keys.choose(f"{train}.crop_type", *_CROPS, default=None)]
    # Where training crops at random, evaluation takes the centre; no crop in one of them has no counterpart.
    keys.choose(f"{val}.crop_type", None if crop == "none" else "central", default=None)
    classes = keys.integer(f"{val}.num_classes", None)
    return {
        "flip_probability": keys.number(f"{train}.h_flip_prob", 0.0),
        "image_size": size,
        "crop": crop,
        "resize_mode": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "has_background": kind == "movi",
        "mask_format": "ids" if kind in ("movi", "davis") else "channels",
        # One-hot ids of MOVi count the background; the other sets only mark objects.
        "max_objects": classes - 1 if classes is not None and kind == "movi" else classes,
    }


def _model(keys: Keys, max_steps: int, clip_length: int) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Class name of a host, its arguments, and settings of `SSyncCallback`: None in a file without SSync."""
    image = keys.choose("model.input_type", "image", "video", default="image") == "image"
    if keys.take("model.visualize", False):
        keys.left_out["model.visualize"] = "the callback SSyncPictures draws pictures"
    slot_dim = keys.integer("model.initializer.dim")
    rules = _ALWAYS | dict.fromkeys(_SLOT_WIDTHS, (slot_dim,))
    if not image:
        rules |= {"predictor.name": _TRANSFORMER, "predictor.dim": (slot_dim,)}
    if keys.take("model.decoder.name") == "SlotMixerDecoder":
        rules |= _MIXER | {f"decoder.{name}": (slot_dim,) for name in _MIXER_WIDTHS}
    for key, choices in rules.items():
        keys.choose(f"model.{key}", *choices)
    feature_dim = keys.integer("model.encoder.output_transform.inp_dim")
    patches = keys.integer("model.decoder.n_patches")
    options: dict[str, Any] = {
        "num_slots": keys.integer("model.initializer.n_slots"),
        "slot_dim": slot_dim,
        "slot_init": "gaussian" if keys.take("model.initializer.name") == "RandomInit" else "learned",
        "slot_init_std": None,
        "encoder_hidden": keys.integer("model.encoder.output_transform.hidden_dim", 4 * feature_dim),
        "corrector_mlp_hidden": 4 * slot_dim * keys.choose("model.grouper.use_mlp", True, False, default=True),
        "corrector_eps": 1e-8,
        **_backbone(keys),
        **_decoder(keys, patches),
    }
    iterations = keys.integer("model.grouper.n_iters", 3)
    weights, more, ssync = _losses(keys, feature_dim, patches, clip_length, max_steps)
    read = feature_dim * (weights["reconstruction"] != 0.0) + patches * (weights["similarity"] != 0.0)
    keys.choose("model.decoder.outp_dim", read)  # the channels that the losses read
    if image:
        alone = weights == {"reconstruction": 1.0, "similarity": 0.0, "contrast": 0.0}
        require(alone, "an image model whose only loss is MSELoss of weight 1, as DINOSAUR has no others", weights)
        return "DINOSAUR", options | {"iterations": iterations}, ssync
    options |= {
        "iterations_first": keys.integer("model.latent_processor.first_step_corrector_args.n_iters", iterations),
        "iterations_later": iterations,
        "predictor_blocks": keys.integer("model.predictor.n_blocks"),
        "predictor_heads": keys.integer("model.predictor.n_heads"),
        "predictor_mlp_hidden": 4 * slot_dim,
        **{f"{kind}_weight": weight for kind, weight in weights.items()},
    }
    return "SlotContrast" if weights["contrast"] else "VideoSAUR", options | more, ssync


def _backbone(keys: Keys) -> dict[str, Any]:
    backbone = "model.encoder.backbone"
    features, name = keys.take(f"{backbone}.features"), str(keys.take(f"{backbone}.model"))
    listed = features if isinstance(features, list) else [features]
    # The official encoder takes the only feature there is, and this one among several.
    layer = listed[0] if len(listed) == 1 else "vit_block12"
    known = layer in listed and all(isinstance(one, str) for one in listed)
    require(known, f"{backbone}.features to be names of layers, 'vit_block12' among them", listed)
    head, _, ending = name.rpartition("_")
    # The official pipeline takes ImageNet's mean for every backbone, as those of DINO and MAE were trained.
    return ({} if re.search("dino|mae", name) else {"backbone_renormalize": False}) | {
        "layer": layer,
        "backbone": f"{name if ending == 'dinov2' else head}.{_TAGS[ending]}" if ending in _TAGS else name,
        "backbone_weights": "pretrained" if keys.take(f"{backbone}.pretrained", False) else "none",
    }


def _decoder(keys: Keys, patches: int) -> dict[str, Any]:
    decoder, side = "model.decoder", math.isqrt(patches)
    require(side * side == patches, f"{decoder}.n_patches to be a square number", patches)
    mixer = keys.take(f"{decoder}.name") == "SlotMixerDecoder"
    layers = keys.take(f"{decoder}.renderer.hidden_dims" if mixer else f"{decoder}.hidden_dims")
    known = isinstance(layers, list) and all(type(size) is int for size in layers)
    require(known, f"hidden_dims of {decoder} to be a list of whole numbers", repr(layers))
    if not mixer:
        return {"decoder": "mlp", "decoder_hidden": layers, "grid": [side, side]}
    last = keys.integer(f"{decoder}.renderer.outp_dim")
    keys.choose(f"{decoder}.renderer_dim", last)
    blocks, heads = (keys.integer(f"{decoder}.allocator.n_{part}") for part in ("blocks", "heads"))
    sizes = {"decoder_hidden": [*layers, last], "mixer_blocks": blocks, "mixer_heads": heads}
    return {"decoder": "mixer", "grid": [side, side], **sizes}


def _losses(
    keys: Keys, feature_dim: int, patches: int, clip_length: int, max_steps: int
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any] | None]:
    """Weights of the host's losses, their options, and SSync's settings."""
    names, weighted = keys.below("model.losses"), keys.below("model.loss_weights")
    same = f"model.loss_weights to name the losses {sorted(names)}"
    require(set(weighted) == set(names), same, sorted(weighted))
    weights = {"reconstruction": 0.0 if names else 1.0, "similarity": 0.0, "contrast": 0.0}
    options: dict[str, Any] = {}
    ssync: dict[str, Any] = {}
    for name in names:
        loss, weight = f"model.losses.{name}", keys.number(f"model.loss_weights.{name}")
        kind = keys.choose(f"{loss}.name", *_KINDS)
        if _KINDS[kind] == "ssync":
            labels, side = _SIDES[keys.choose(f"{loss}.pred_key", *_SIDES)]
            keys.choose(f"{loss}.target_key", labels)
            temperature = keys.number(f"{loss}.temperature", 1.0)
            alike = ssync.setdefault("temperature", temperature) == temperature and side not in ssync
            require(alike, "one temperature for both losses of SSync, and each loss once", f"another at {loss}")
            ssync[side] = weight
            continue
        require(not weights[_KINDS[kind]], f"one loss of the kind of {loss}", "a second", advice="Leave one out.")
        weights[_KINDS[kind]] = weight
        if kind == "MSELoss":
            keys.choose(f"{loss}.pred_dims", [0, feature_dim])
        elif kind == "CrossEntropyLoss":
            keys.choose(f"{loss}.pred_dims", [feature_dim, feature_dim + patches], [0, patches])
            options |= _similarity(keys, loss)
        else:
            for key, value in (("pred_key", "processor.state"), ("patch_inputs", False), ("keep_input_dim", True)):
                keys.choose(f"{loss}.{key}", value)
            options["contrast_temperature"] = keys.number(f"{loss}.temperature", 0.1)
            options["contrast_across_batch"] = keys.choose(f"{loss}.batch_contrast", True, False, default=True)
            if kind == _IMAGE_CONTRAST:
                require(clip_length == 1, f"clips of one frame with {kind}", f"{clip_length} frames")
                keys.left_out[loss] = "for clips of one frame it is 0 and has no gradient"
                options["contrast_weight"] = 0.0
    counts = (("n_bd", "dif_n_bd"), ("n_nbd", "dif_n_nbd"), ("n_noise", "dif_n_bd_noise"))
    settings = {ours: keys.integer(f"model.{theirs}", 1) for ours, theirs in counts}
    settings["merge_threshold"] = keys.number("model.merge_iou_threshold", 0.6)
    ratio, steps = keys.number("model.synergistic_warmup_ratio", 0.3), keys.integer("model.max_steps", 100_000)
    # The official code counts the warm-up in steps of its own `max_steps`.
    warmup = {"warmup_ratio": ratio} if steps == max_steps else {"warmup_steps": math.ceil(ratio * steps)}
    sides = {side: ssync.get(side, 0.0) for _, side in _SIDES.values()}
    return weights, options, {**settings, **sides, **ssync, **warmup} if any(sides.values()) else None


def _similarity(keys: Keys, loss: str) -> dict[str, Any]:
    """Options of VideoSAUR's loss."""
    transform, target = f"{loss}.target_transform", str(keys.take(f"{loss}.target_key"))
    layer = re.fullmatch(r"encoder\.(vit_(?:block|block_keys)\d+|vit_output)", target)
    require(layer is not None, f"{loss}.target_key to be a layer of the encoder", repr(target))
    keys.choose(f"{transform}.name", "utils.FeatureTimeSimilarity")
    keys.choose(f"{transform}.softmax", True)
    keys.choose(f"{loss}.remove_last_n_frames", 1)
    return {
        "similarity_layer": layer and layer[1],
        "similarity_temperature": keys.number(f"{transform}.temperature", 1.0),
        "similarity_threshold": keys.number(f"{transform}.threshold", None),
        "similarity_shift": 1,
    }
