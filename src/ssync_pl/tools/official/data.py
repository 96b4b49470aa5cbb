"""The data section of public configurations as a data module of this package."""

from __future__ import annotations

import posixpath
from typing import Any

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.sections import Section

__all__ = ["translate_data"]

_IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_HALF = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
_CROPS = {None: "none", "central": "center", "short_side_resize_random": "random"}


def translate_data(dataset: Section, metrics: Section, root: str | None = None) -> dict[str, Any]:
    """Translate `dataset`, and what `val_metrics` say about its masks.

    Args:
        dataset: The section, references resolved.
        metrics: The section of the metrics.
        root: Folder or URL that the shards lie below; `None` leaves their names as they are.

    Returns:
        Arguments of `ShardDataModule`.

    Raises:
        ConfigError: A part has no counterpart, or training and validation contradict each other.

    Example:
        >>> from ssync_pl.tools.official.sections import Findings
        >>> pipe = {"chunk_size": 4, "sample_one_chunk_per_video": True, "keys": ["video"],
        ...         "transforms": {"name": "movi_train", "type": "video", "input_size": 224}}
        >>> section = Section({"train_shards": "a-{0..1}.tar", "train_pipeline": pipe}, "dataset", Findings())
        >>> data = translate_data(section, Section(None, "val_metrics", Findings()), root="shards")
        >>> data["train"], data["image_size"], data["clip_length"]
        ('shards/a-{0..1}.tar', 224, 4)
    """
    why = "The data module of this package reads tar shards."
    dataset.need("name", "WebdatasetDataModule", default="WebdatasetDataModule", why=why)
    options: dict[str, Any] = {}
    for theirs, ours in (("train_shards", "train"), ("val_shards", "validation"), ("test_shards", "test")):
        shards = dataset.take(theirs, None)
        if shards is not None:
            options[ours] = _rooted(shards, root)
    options["batch_size"] = dataset.integer("batch_size", 32)
    options["val_batch_size"] = dataset.integer("val_batch_size", options["batch_size"])
    options["num_workers"] = dataset.integer("num_workers", 0)
    workers = dataset.integer("num_val_workers", options["num_workers"])
    if workers != options["num_workers"]:
        key = dataset.key("num_val_workers")
        dataset.findings.leave(key, f"validation has the {options['num_workers']} workers of num_workers")
    for name in ("val_size", "test_size"):
        dataset.take(name, None)  # the data module counts videos itself
    dataset.leave("a pass is each video once", "samples_per_epoch")
    dataset.leave("shards on disk are mapped into memory instead", "cache_train", "cache_val", "cache_dir")
    training = dataset.section("train_pipeline")
    if training.present:
        _training_clips(training, options)
    scored = dataset.section("val_pipeline")
    if scored.present:
        _validation_clips(scored)
    _pictures(training.section("transforms"), scored.section("transforms"), options)
    _overlaps(metrics, options)
    options["sampling"] = "reference"
    return options


def _rooted(shards: Any, root: str | None) -> Any:
    if isinstance(shards, list):
        return [_rooted(shard, root) for shard in shards]
    # A name from the root of the disk stands for itself, as in the official code.
    return str(shards) if root is None else posixpath.join(root, str(shards))


def _training_clips(pipeline: Section, options: dict[str, Any]) -> None:
    name = pipeline.need("name", "video", "VideoPipeline", "image", "ImagePipeline", default="video", why="No others.")
    pipeline.take("keys", None)  # hosts say what they read
    pipeline.need("duplicate", None, default=None, why="Batches of this package hold each member once.")
    options["shuffle_buffer"] = pipeline.integer("shuffle_size", 1000 if name.lower().startswith("image") else 100)
    frames = pipeline.integer("video_size", None)
    if name.lower().startswith("image"):
        options["clip_length"] = 1
        whole = pipeline.take("is_video_dataset", True) and not pipeline.take("one_frame_per_video", False)
    else:
        pipeline.need("use_chunks", True, default=True, why="Training of this package is on clips.")
        options["clip_length"] = pipeline.integer("chunk_size", 6)
        whole = not pipeline.take("sample_one_chunk_per_video", False)
    if whole:
        if frames is None:
            pipeline.findings.leave(pipeline.path, "a pass is one clip a video instead of all of its clips")
        else:
            options["clips_per_video"] = frames // options["clip_length"]


def _validation_clips(pipeline: Section) -> None:
    name = pipeline.need("name", "video", "VideoPipeline", "image", "ImagePipeline", default="video", why="No others.")
    for key in ("keys", "shuffle_size", "video_size"):
        pipeline.take(key, None)  # nothing is shuffled here, and videos are counted
    pipeline.need("duplicate", None, default=None, why="Batches of this package hold each member once.")
    if name.lower().startswith("image"):
        if pipeline.take("is_video_dataset", True):
            pipeline.findings.leave(pipeline.path, "validation scores whole videos instead of single frames")
        pipeline.take("one_frame_per_video", False)
        return
    length = pipeline.integer("chunk_size", 6)
    if pipeline.take("use_chunks", True):
        reason = f"validation scores whole videos instead of clips of {length} frames, so video metrics differ"
        pipeline.findings.leave(pipeline.key("use_chunks"), reason)
    pipeline.take("sample_one_chunk_per_video", False)


def _pictures(train: Section, scored: Section, options: dict[str, Any]) -> None:
    kinds: list[str] = []
    crops: list[str] = []
    sizes: list[Any] = []
    normalised: list[bool] = []
    for section in (train, scored):
        if not section.present:
            continue
        kind, _, _ = str(section.take("name")).partition("_")
        kinds.append(kind)
        section.need("type", "video", "image", default="video", why="There are no others.")
        crop = section.take("crop_type", None)
        if crop not in _CROPS:
            raise ConfigError(
                f"Expected {section.key('crop_type')} to be one of {', '.join(map(str, _CROPS))}, but got {crop!r}. "
                "The data module has no such crop."
            )
        crops.append(_CROPS[crop])
        sizes.append(section.take("input_size"))
        normalised.append(bool(section.take("use_movi_normalization", False)))
        section.need("target_size", None, default=None, why="Hosts of this package rebuild what they see.")
        section.leave("the official code does not read it", "resize_type", "resize_size", "crop_size")
    for name, found in (("input_size", sizes), ("use_movi_normalization", normalised), ("name", kinds)):
        if any(value != found[0] for value in found):
            raise ConfigError(f"Expected one {name} in training and validation, but got {found}. Make them equal.")
    # Where training crops at random, evaluation takes the centre; no crop in one of them has no counterpart.
    if len(crops) == 2 and crops[1] != ("none" if crops[0] == "none" else "center"):
        raise ConfigError(f"Expected validation to crop like training, but got {crops[0]!r} and {crops[1]!r}.")
    options["flip_probability"] = train.number("h_flip_prob", 0.0) if train.present else 0.0
    options["image_size"] = sizes[0] if sizes else None
    options["crop"] = crops[0] if crops else "none"
    options["resize_mode"] = "bicubic"
    mean, std = _HALF if normalised and normalised[0] else _IMAGENET
    options["mean"], options["std"] = list(mean), list(std)
    if kinds:
        _masks(kinds[0], train, scored, options)


def _masks(kind: str, train: Section, scored: Section, options: dict[str, Any]) -> None:
    if kind not in ("movi", "ytvis", "davis", "coco"):
        raise ConfigError(
            f"Expected {scored.key('name')} to be of movi, ytvis, davis or coco, but got {kind!r}. Name the one whose "
            "masks are stored alike."
        )
    classes = scored.integer("num_classes", None)
    train.take("num_classes", None)  # training reads no masks
    options["has_background"] = kind == "movi"
    options["mask_format"] = "ids" if kind in ("movi", "davis") else "channels"
    # One-hot ids of MOVi count the background; the other sets only mark objects.
    options["max_objects"] = classes - 1 if classes is not None and kind == "movi" else classes
    if kind == "coco":
        reason = "masks (objects, height, width) of public shards have to be stored as (height, width, objects)"
        scored.findings.leave(scored.key("name"), reason)
    size, masks = options["image_size"], scored.take("mask_size", None)
    if masks is not None and masks != size:
        scored.findings.leave(scored.key("mask_size"), f"masks are scored at {size} pixels instead of {masks}")


def _overlaps(metrics: Section, options: dict[str, Any]) -> None:
    ignored = []
    for name in metrics.values:
        metric = metrics.section(name)
        kind = metric.take("name")
        why = "Every evaluation of this package logs ARI, foreground ARI, mBO and mIoU of videos and frames."
        metric.need("name", "VideoARI", "ImageARI", "VideoIoU", "ImageIoU", why=why)
        if str(kind).endswith("IoU"):
            metric.need("matching", "overlap", "hungarian", default="overlap", why=why)
        for key in ("true_key", "video_input", "ignore_background", "matching"):
            metric.take(key, None)
        metric.need(
            "pred_key", "decoder_masks_hard", default="decoder_masks_hard", why=f"{why} It scores decoder masks."
        )
        ignored.append(bool(metric.take("ignore_overlaps", False)))
    if ignored and all(ignored) != any(ignored):
        raise ConfigError(f"Expected ignore_overlaps to be the same in all metrics, but got {ignored}. Make it so.")
    # Without it the official metrics refuse overlapping masks, so that there is nothing to ignore where they run.
    if ignored and ignored[0]:
        options["ignore_overlaps"] = True
