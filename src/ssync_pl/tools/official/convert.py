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
    """Translates an official configuration of VideoSAUR, SlotContrast or SSync.

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
    keys.leave_out(_LEFT_OUT)
    name, max_steps = str(keys.take("experiment_name", Path(path).stem)), keys.integer("trainer.max_steps", 100_000)
    data = _data(keys, root)
    host, options, ssync = translate_model(keys, max_steps, data["clip_length"])
    options |= _optimizer(keys, max_steps) | {"has_background": data["has_background"]}
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


def _optimizer(keys: Keys, max_steps: int) -> dict[str, Any]:
    """Arguments of a host: learning rate, warm-up and decay."""
    keys.choose("optimizer.name", "Adam")
    rate, schedule = keys.number("optimizer.lr"), "optimizer.lr_scheduler"
    keys.choose(f"{schedule}.name", "exp_decay_with_warmup")
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
    keys.choose("dataset.name", "WebdatasetDataModule", default="WebdatasetDataModule")
    options: dict[str, Any] = {}
    for theirs, ours in (("train_shards", "train"), ("val_shards", "validation"), ("test_shards", "test")):
        shards = keys.take(f"dataset.{theirs}", None)
        if shards is not None:
            listed = shards if isinstance(shards, list) else [shards]
            rooted = [str(one) if root is None else posixpath.join(root, str(one)) for one in listed]
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
