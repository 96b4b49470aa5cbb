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
_PIPELINES = ("video", "VideoPipeline", "image", "ImagePipeline")


def translate_data(dataset: Section, metrics: Section, root: str | None = None) -> dict[str, Any]:
    """Translates `dataset`, and what `val_metrics` say about its masks.

    Args:
        dataset: The section, references resolved.
        metrics: The section of the metrics.
        root: Folder or URL that the shards lie below; `None` leaves their names as they are.

    Returns:
        Arguments of `ShardDataModule`.

    Raises:
        ConfigError: A part has no counterpart, or training and validation contradict each other.
    """
    dataset.fixed("The data module of this package reads tar shards.", name="WebdatasetDataModule")
    options: dict[str, Any] = {}
    for theirs, ours in (("train_shards", "train"), ("val_shards", "validation"), ("test_shards", "test")):
        shards = dataset.take(theirs, None)
        if shards is not None:
            rooted = [str(one) if root is None else posixpath.join(root, str(one)) for one in _listed(shards)]
            options[ours] = rooted if isinstance(shards, list) else rooted[0]
    options["batch_size"] = dataset.integer("batch_size", 32)
    options["val_batch_size"] = dataset.integer("val_batch_size", options["batch_size"])
    options["num_workers"] = dataset.integer("num_workers", 0)
    if dataset.integer("num_val_workers", options["num_workers"]) != options["num_workers"]:
        dataset.leave(f"validation has the {options['num_workers']} workers of num_workers", "num_val_workers")
    dataset.skip("val_size", "test_size")  # the data module counts videos itself
    dataset.leave("an epoch is each video once", "samples_per_epoch")
    dataset.leave("shards on disk are mapped into memory instead", "cache_train", "cache_val", "cache_dir")
    training, scored = dataset.section("train_pipeline"), dataset.section("val_pipeline")
    if training.present:
        _training_clips(training, options)
    if scored.present:
        _validation_clips(scored)
    _pictures(training.section("transforms"), scored.section("transforms"), options)
    _overlaps(metrics, options)
    return {**options, "sampling": "reference"}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_image(pipeline: Section) -> bool:
    name = pipeline.need("name", *_PIPELINES, default="video", why="There are no others.")
    pipeline.fixed("Batches of this package hold each member once.", duplicate=None)
    pipeline.skip("keys")  # hosts say what they read
    return str(name).lower().startswith("image")


def _training_clips(pipeline: Section, options: dict[str, Any]) -> None:
    image = _is_image(pipeline)
    options["shuffle_buffer"] = pipeline.integer("shuffle_size", 1000 if image else 100)
    frames = pipeline.integer("video_size", None)
    if image:
        options["clip_length"] = 1
        whole = pipeline.take("is_video_dataset", True) and not pipeline.take("one_frame_per_video", False)
    else:
        pipeline.fixed("Training of this package is on clips.", use_chunks=True)
        options["clip_length"] = pipeline.integer("chunk_size", 6)
        whole = not pipeline.take("sample_one_chunk_per_video", False)
    if whole and frames is None:
        pipeline.note("an epoch is one clip per video instead of all of its clips")
    elif whole:
        options["clips_per_video"] = frames // options["clip_length"]


def _validation_clips(pipeline: Section) -> None:
    pipeline.skip("shuffle_size", "video_size")  # nothing is shuffled here, and videos are counted
    if _is_image(pipeline):
        if pipeline.take("is_video_dataset", True):
            pipeline.note("validation scores whole videos instead of single frames")
        pipeline.skip("one_frame_per_video")
        return
    length = pipeline.integer("chunk_size", 6)
    if pipeline.take("use_chunks", True):
        reason = f"validation scores whole videos instead of clips of {length} frames, so video metrics differ"
        pipeline.findings.left_out[pipeline.key("use_chunks")] = reason
    pipeline.skip("sample_one_chunk_per_video")


def _pictures(train: Section, scored: Section, options: dict[str, Any]) -> None:
    found: dict[str, list[Any]] = {"name": [], "input_size": [], "use_movi_normalization": []}
    crops: list[str] = []
    for section in (train, scored):
        if not section.present:
            continue
        found["name"].append(str(section.take("name")).partition("_")[0])
        found["input_size"].append(section.take("input_size"))
        found["use_movi_normalization"].append(bool(section.take("use_movi_normalization", False)))
        section.need("type", "video", "image", default="video", why="There are no others.")
        section.fixed("Hosts of this package rebuild what they see.", target_size=None)
        crop = section.need("crop_type", *_CROPS, default=None, why="The data module has no such crop.")
        crops.append(_CROPS[crop])
        section.leave("the official code does not read it", "resize_type", "resize_size", "crop_size")
    for name, values in found.items():
        if any(value != values[0] for value in values):
            raise ConfigError(f"Expected one {name} in training and validation, but got {values}. Make them equal.")
    # Where training crops at random, evaluation takes the centre; no crop in one of them has no counterpart.
    if len(crops) == 2 and crops[1] != ("none" if crops[0] == "none" else "center"):
        raise ConfigError(f"Expected validation to crop like training, but got {crops[0]!r} and {crops[1]!r}.")
    mean, std = _HALF if any(found["use_movi_normalization"]) else _IMAGENET
    options |= {
        "flip_probability": train.number("h_flip_prob", 0.0) if train.present else 0.0,
        "image_size": found["input_size"][0] if crops else None,
        "crop": crops[0] if crops else "none",
        "resize_mode": "bicubic",
        "mean": list(mean),
        "std": list(std),
    }
    if crops:
        _masks(found["name"][0], train, scored, options)


def _masks(kind: str, train: Section, scored: Section, options: dict[str, Any]) -> None:
    if kind not in ("movi", "ytvis", "davis", "coco"):
        raise ConfigError(
            f"Expected {scored.key('name')} to be of movi, ytvis, davis or coco, but got {kind!r}. Name the one whose "
            "masks are stored alike."
        )
    classes = scored.integer("num_classes", None)
    train.skip("num_classes")  # training reads no masks
    options["has_background"] = kind == "movi"
    options["mask_format"] = "ids" if kind in ("movi", "davis") else "channels"
    # One-hot ids of MOVi count the background; the other sets only mark objects.
    options["max_objects"] = classes - 1 if classes is not None and kind == "movi" else classes
    size, masks = options["image_size"], scored.take("mask_size", None)
    if masks is not None and masks != size:
        scored.leave(f"masks are scored at {size} pixels instead of {masks}", "mask_size")


def _overlaps(metrics: Section, options: dict[str, Any]) -> None:
    ignored = []
    why = "Every evaluation of this package logs ARI, foreground ARI, mBO and mIoU of the decoder's masks."
    for name in metrics.values:
        metric = metrics.section(name)
        kind = metric.need("name", "VideoARI", "ImageARI", "VideoIoU", "ImageIoU", why=why)
        if kind.endswith("IoU"):
            metric.need("matching", "overlap", "hungarian", default="overlap", why=why)
        metric.skip("true_key", "video_input", "ignore_background", "matching")
        metric.fixed(f"{why} It scores decoder masks.", pred_key="decoder_masks_hard")
        ignored.append(bool(metric.take("ignore_overlaps", False)))
    if any(ignored) and not all(ignored):
        raise ConfigError(f"Expected ignore_overlaps to be the same in all metrics, but got {ignored}. Make it so.")
    # Without it the official metrics refuse overlapping masks, so that there is nothing to ignore where they run.
    if any(ignored):
        options["ignore_overlaps"] = True
