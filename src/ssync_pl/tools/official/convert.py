"""Public configurations of the VideoSAUR family as configurations of `ssync-pl fit`."""

from __future__ import annotations

import inspect
import posixpath
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssync_pl.errors import require
from ssync_pl.tools.official.keys import Keys
from ssync_pl.tools.official.model import translate_model
from ssync_pl.tools.official.references import read_config

__all__ = ["ConvertedConfig", "convert_config"]

_IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_HALF = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
_CROPS = {None: "none", "central": "center", "short_side_resize_random": "random"}
_TRAIN, _VAL = "dataset.train_pipeline", "dataset.val_pipeline"
_FIXED = {
    "dataset.name": "WebdatasetDataModule",
    "dataset.train_pipeline.use_chunks": True,
    "dataset.*.transforms.type": ("video", "image"),
    "val_metrics.*.name": ("VideoARI", "ImageARI", "VideoIoU", "ImageIoU"),  # every evaluation logs these
    "val_metrics.*.matching": ("overlap", "hungarian"),
    "val_metrics.*.pred_key": "decoder_masks_hard",
    "optimizer.name": ("Adam", "adam"),
    "optimizer.lr_scheduler.name": "exp_decay_with_warmup",
}
# The data module counts videos itself, training reads no masks, and hosts say what they read.
_MEANINGLESS = (
    *("experiment_group", "globals.*", "val_metrics.*", "dataset.*.keys", "dataset.val_size", "dataset.test_size"),
    *(f"dataset.val_pipeline.{name}_per_video" for name in ("sample_one_chunk", "one_frame")),
    *("dataset.val_pipeline.shuffle_size", "dataset.val_pipeline.video_size"),
    "dataset.train_pipeline.transforms.num_classes",
)
_NOT_TRANSLATED = {
    "train_metrics.*": "metrics are of evaluation only",
    "dataset.samples_per_epoch": "an epoch is each video once",
    "dataset.cache_*": "shards on disk are mapped into memory instead",
    "dataset.*.transforms.resize_*": "the official code does not read it",
    "dataset.*.transforms.crop_size": "the official code does not read it",
    "trainer.*_epoch*": "training ends by steps, as in the official script",
    "trainer.find_unused_parameters": "name a strategy, for example ddp_find_unused_parameters_true",
    "trainer.replace_sampler_ddp": "the data module shares out videos itself",
}


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
    """Translates an official configuration of VideoSAUR, SlotContrast, SRL or SSync.

    Args:
        path: The official YAML file.
        root: Folder or URL that the shards lie below; `None` leaves their names as they are.
        changes: `KEY=VALUE` in the official file's own keys, put in before; `null` leaves a key out.

    Raises:
        ConfigError: There is no such file; a part has no counterpart; unknown keys of model, optimizer or data.
    """
    keys = Keys(read_config(path, changes))
    for part in ("model", "optimizer", "dataset"):
        require(bool(keys.below(part)), f"{path} to have the sections model, optimizer and dataset", f"no {part}")
    keys.check(_FIXED)
    ignored = [keys.values.get(f"val_metrics.{name}.ignore_overlaps", False) for name in keys.below("val_metrics")]
    for pattern, reason in (dict.fromkeys(_MEANINGLESS, "") | _NOT_TRANSLATED).items():
        keys.skip(pattern, reason)
    name, seed = str(keys.take("experiment_name", "")), keys.integer("seed", None)
    max_steps = keys.integer("trainer.max_steps", 100_000)
    data = _data(keys, root)
    # Without it the official metrics refuse overlapping masks, so that there is nothing to ignore where they run.
    if any(ignored):
        require(all(ignored), "ignore_overlaps to be the same in all metrics", ignored, advice="Make it so.")
        data["ignore_overlaps"] = True
    host, options, ssync = translate_model(keys, max_steps, data.get("clip_length", 1))
    options |= _optimizer(keys, max_steps) | {"has_background": data.get("has_background", True)}
    # The scripts of SSync and SRL train in mixed half precision, whatever the file says.
    trainer = _trainer(keys, max_steps, ssync is not None or any("projector" in key for key in keys.values))
    callbacks = [{"class_path": "SSyncCallback", "init_args": ssync}] if ssync is not None else []
    every = keys.integer("checkpoint_every_n_steps", 1_000)
    checkpoints = {"every_n_train_steps": every, "filename": "{step}", "save_last": True}
    trainer["callbacks"] = [*callbacks, {"class_path": "ModelCheckpoint", "init_args": checkpoints}]
    keys.refuse_unread("model", "optimizer", "dataset")
    config = {
        "seed_everything": True if seed is None else seed,
        **({"name": name} if name else {}),
        "trainer": trainer,
        "model": {"class_path": host, "init_args": options},
        "data": {"class_path": "ShardDataModule", "init_args": data | ({} if seed is None else {"seed": seed})},
    }
    return ConvertedConfig(config, keys.left_out, Path(path).name)


def _trainer(keys: Keys, max_steps: int, half_precision: bool) -> dict[str, Any]:
    """Arguments of Lightning's Trainer, with the official script's own defaults."""
    import lightning.pytorch as L

    known = inspect.signature(L.Trainer.__init__).parameters
    names = [name for name in keys.below("trainer") if name in known and f"trainer.{name}" not in keys.left_out]
    return ({"precision": "16-mixed"} if half_precision else {}) | {
        **{name: keys.take(f"trainer.{name}") for name in names},
        "max_steps": max_steps,
        "max_epochs": -1,
        "val_check_interval": keys.take("trainer.val_check_interval", 5_000),
        "check_val_every_n_epoch": None,
        "log_every_n_steps": keys.integer("trainer.log_every_n_steps", 100),
    }


def _optimizer(keys: Keys, max_steps: int) -> dict[str, Any]:
    """Arguments of a host: learning rate, warm-up and decay."""
    schedule = "optimizer.lr_scheduler"
    rate = keys.number("optimizer.lr")
    if not keys.below(schedule):
        return {"learning_rate": rate, "warmup_steps": 0, "decay_rate": 1.0}
    steps = keys.integer(f"{schedule}.decay_steps", 100_000)
    return {
        "learning_rate": rate,
        "warmup_steps": keys.integer(f"{schedule}.warmup_steps", 1_000),
        # Tied to the length of the training in the public files, so that it follows when a user changes that.
        "decay_steps": None if steps == max_steps else steps,
        "decay_rate": keys.number(f"{schedule}.decay_rate", 0.5),
    }


def _data(keys: Keys, root: str | None) -> dict[str, Any]:
    """Arguments of `ShardDataModule`."""
    options: dict[str, Any] = {}
    for theirs, ours in (("train_shards", "train"), ("val_shards", "validation"), ("test_shards", "test")):
        shards = keys.take(f"dataset.{theirs}", None)
        if shards is not None:
            listed = shards if isinstance(shards, list) else [shards]
            rooted = [str(one) if root is None else posixpath.join(root, str(one)) for one in listed]
            options[ours] = rooted if isinstance(shards, list) else rooted[0]
    options["batch_size"] = keys.integer("dataset.batch_size", 32)
    options["val_batch_size"] = keys.integer("dataset.val_batch_size", options["batch_size"])
    options["num_workers"] = workers = keys.integer("dataset.num_workers", 0)
    if keys.integer("dataset.num_val_workers", workers) != workers:
        keys.skip("dataset.num_val_workers", f"validation has the {workers} workers of num_workers")
    if keys.below(_TRAIN):
        _training_clips(keys, options)
    if keys.below(_VAL):
        _validation_clips(keys)
    _pictures(keys, options)
    return {**options, "sampling": "reference"}


def _is_image(keys: Keys, pipeline: str) -> bool:
    kinds = ("video", "VideoPipeline", "image", "ImagePipeline")
    return str(keys.choose(f"{pipeline}.name", *kinds, default="video")).lower().startswith("image")


def _training_clips(keys: Keys, options: dict[str, Any]) -> None:
    image, frames = _is_image(keys, _TRAIN), keys.integer(f"{_TRAIN}.video_size", None)
    options["shuffle_buffer"] = keys.integer(f"{_TRAIN}.shuffle_size", 1000 if image else 100)
    options["clip_length"] = 1 if image else keys.integer(f"{_TRAIN}.chunk_size", 6)
    if image:
        one = keys.take(f"{_TRAIN}.one_frame_per_video", False)
        one = not keys.take(f"{_TRAIN}.is_video_dataset", True) or one
    else:
        one = keys.take(f"{_TRAIN}.sample_one_chunk_per_video", False)
    if not one and frames is None:
        keys.left_out[_TRAIN] = "an epoch is one clip per video instead of all of its clips"
    elif not one:
        options["clips_per_video"] = frames // options["clip_length"]


def _validation_clips(keys: Keys) -> None:
    if _is_image(keys, _VAL):
        if keys.take(f"{_VAL}.is_video_dataset", True):
            keys.left_out[_VAL] = "validation scores whole videos instead of single frames"
        return
    length = keys.integer(f"{_VAL}.chunk_size", 6)
    if keys.take(f"{_VAL}.use_chunks", True):
        reason = f"validation scores whole videos instead of clips of {length} frames, so video metrics differ"
        keys.left_out[f"{_VAL}.use_chunks"] = reason


def _pictures(keys: Keys, options: dict[str, Any]) -> None:
    """Size, crop and normalisation of the frames, and the form of the masks."""
    sections = [f"{pipeline}.transforms" for pipeline in (_TRAIN, _VAL) if keys.below(f"{pipeline}.transforms")]
    facts = [
        (
            str(keys.take(f"{section}.name")).partition("_")[0],
            keys.take(f"{section}.input_size"),
            bool(keys.take(f"{section}.use_movi_normalization", False)),
            _CROPS[keys.choose(f"{section}.crop_type", *_CROPS, default=None)],
        )
        for section in sections
    ]
    kind, size, half, crop = facts[0] if facts else ("", None, False, "none")
    # Where training crops at random, evaluation takes the centre; no crop in one of them has no counterpart.
    wanted = (kind, size, half, "none" if crop == "none" else "center")
    expected = "name, input_size, use_movi_normalization and crop_type of training and validation to agree"
    require(facts[1:] in ([], [wanted]), expected, *facts, advice="Make them alike.")
    mean, std = _HALF if half else _IMAGENET
    options |= {
        "flip_probability": keys.number(f"{_TRAIN}.transforms.h_flip_prob", 0.0),
        "image_size": size,
        "crop": crop,
        "resize_mode": "bicubic",
        "mean": list(mean),
        "std": list(std),
    }
    if not facts:
        return
    known = kind in ("movi", "ytvis", "davis", "coco")
    require(known, f"{_VAL}.transforms.name to be of movi, ytvis, davis or coco", repr(kind))
    classes = keys.integer(f"{_VAL}.transforms.num_classes", None)
    options["has_background"] = kind == "movi"
    options["mask_format"] = "ids" if kind in ("movi", "davis") else "channels"
    # One-hot ids of MOVi count the background; the other sets only mark objects.
    options["max_objects"] = classes - 1 if classes is not None and kind == "movi" else classes
    masks = keys.take(f"{_VAL}.transforms.mask_size", size)
    if masks != size:
        keys.skip(f"{_VAL}.transforms.mask_size", f"masks are scored at {size} pixels instead of {masks}")
