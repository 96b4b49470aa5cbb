"""The Lightning data module over shards."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as L
import torch

from ssync_pl.data.dataset import Backend, ShardDataset, open_source
from ssync_pl.data.decode import MAX_MEMBER_BYTES
from ssync_pl.data.loader import ShardLoader, mend_resume
from ssync_pl.data.patterns import Patterns
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.stream import ShardStream
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.errors import choose, require

_logger = logging.getLogger(__name__)

# Sets that a stage, or a verb of the Trainer, reads
_SPLITS: dict[str, tuple[str, ...]] = {"fit": ("train", "validation"), "validate": ("validation",)}
_SPLITS |= {"test": ("test",), "predict": ("predict",)}


class ShardDataModule(L.LightningDataModule):
    """Videos from tar shards of the field (MOVi, YT-VIS, …), local or remote, read unchanged.

    Training draws one random clip per video and pass; evaluation takes every whole video exactly once at any number of
    processes. Workers send uint8; resizing, cropping, flipping and normalising happen on the device, in
    `on_after_batch_transfer`. Every random choice is a function of (seed, pass, key), and batches of local plain tars
    do not depend on the number of workers: a run that was interrupted in the middle of a pass goes on with the batch
    that was next. A stream goes on without its shuffle buffers.

    Batches are dicts: `video` (B, T, 3, H, W) float32; `__key__`; in evaluation `segmentations` (B, T, C, H, W) bool,
    `batch_padding_mask` (B,) bool (`False` = a repeat that must not be counted), `frame_mask` (B, T) bool (`False` =
    padding of a shorter video).

    Args:
        train: Training shards: a path, URL or pattern (`movi_c-train-{000000..000304}.tar`, `train-*.tar`), or several.
        validation: Validation shards; `None` validates nothing.
        test: Test shards.
        predict: Shards for `predict`; masks are not read.
        batch_size: Clips per batch and process.
        val_batch_size: Videos per batch and process in evaluation; `None` takes `batch_size`.
        clip_length: Frames of a training clip.
        frame_stride: Distance between the frames of a clip, in frames.
        clips_per_video: Clips of each video per pass.
        image_size: Height and width of the batch, or one number for both; `None` keeps the stored size.
        resize_mode: `bicubic` (clamped) or `bilinear`.
        crop: `none` resizes to `image_size`; `random` and `center` cover it, keep proportions and crop. Evaluation
            crops centrally in both cases.
        flip_probability: Probability of a left-right flip of a training clip, in [0, 1].
        mean: Per-channel mean of frames in [0, 1]; ImageNet's by default, SAVi takes 0.5.
        std: Per-channel standard deviation of frames in [0, 1]; SAVi takes 0.5, which gives [-1, 1].
        masks_in_training: Read object masks in training too.
        has_background: Make the first mask channel the background. `False` for sets that only mark objects (YT-VIS).
        mask_format: How masks are stored: `ids` (F, h, w, 1) with 0 = background, `channels` (F, h, w, N) with one
            channel per object. `auto` looks: more than one channel anywhere means `channels`; streams are taken as
            `ids` when `has_background`, else as `channels`.
        ignore_overlaps: Leave pixels with several true masks out of the scores, for hosts that ask. `None` does so for
            sets whose objects have channels of their own, which may overlap (YT-VIS, COCO).
        max_objects: Object channels of `segmentations`, without the background. `None` counts them, reading every mask
            once (streams: the most of each batch). MOVi-C has 10, MOVi-E 23, YT-VIS takes 25.
        num_workers: Worker processes per loader.
        start_method: How workers start: `fork`, `spawn` or `forkserver`; `None` takes Python's default.
        shuffle_buffer: Clips that each worker of a stream holds back to be mixed in training; local plain tars are
            mixed as a whole.
        seed: Seed of all random choices.
        sampling: `hashed` lets a clip start at any frame. `reference` does as published VideoSAUR-style pipelines: a
            clip starts at a multiple of its length, resizing does not smooth, `center` cuts the central square first.
        backend: `mmap` reads plain local tars in place; `webdataset` streams, from disk or URLs, packed tars too;
            `auto` reads in place what can be.
        features: Folder that `ssync-pl data cache-features` wrote for these shards; batches then hold `features`
            (B, T, N, D) float32. Local sets only.
        features_only: Leave the frames out of training batches, for hosts that read nothing but `features`.
        on_bad_sample: `raise`, or `skip`: log the sample once, count it in `bad_samples` and put another in its place
            (in evaluation, one that is not counted). A shard that is cut off is always refused.
        max_member_bytes: Most bytes of a member, as it is stored and as it is decoded; larger ones are bad samples.

    Raises:
        ConfigError: A setting is out of range, or settings contradict each other.
    """

    def __init__(
        self,
        train: Patterns | None = None,
        validation: Patterns | None = None,
        test: Patterns | None = None,
        predict: Patterns | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        clip_length: int = 4,
        frame_stride: int = 1,
        clips_per_video: int = 1,
        image_size: int | tuple[int, int] | None = None,
        resize_mode: Literal["bicubic", "bilinear"] = "bicubic",
        crop: Literal["none", "random", "center"] = "none",
        flip_probability: float = 0.5,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        masks_in_training: bool = False,
        has_background: bool = True,
        mask_format: Literal["auto", "ids", "channels"] = "auto",
        ignore_overlaps: bool | None = None,
        max_objects: int | None = None,
        num_workers: int = 2,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
        shuffle_buffer: int = 64,
        seed: int = 0,
        sampling: Literal["hashed", "reference"] = "hashed",
        backend: Backend = "auto",
        features: str | None = None,
        features_only: bool = False,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        max_member_bytes: int = MAX_MEMBER_BYTES,
    ) -> None:
        super().__init__()
        reference = sampling == "reference"
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        for name, least, value in (
            *(("batch_size", 1, batch_size), ("val_batch_size", 1, val_batch_size)),
            *(("clips_per_video", 1, clips_per_video), ("max_member_bytes", 1, max_member_bytes)),
            *(("clip_length", 1, clip_length), ("frame_stride", 1, frame_stride)),
            *(("num_workers", 0, num_workers), ("shuffle_buffer", 0, shuffle_buffer), ("max_objects", 1, max_objects)),
        ):
            require(value is None or value >= least, f"argument `{name}` to be at least {least}", value)
        require((max_objects or 1) <= 254, "argument `max_objects` to be at most 254", max_objects)
        require(0 <= flip_probability <= 1, "argument `flip_probability` to be in [0, 1]", flip_probability)
        even = frame_stride == 1 or not reference
        require(even, "argument `frame_stride` to be 1 for sampling='reference'", frame_stride)
        choose("mask_format", mask_format, "auto", "ids", "channels")
        choose("sampling", sampling, "hashed", "reference")
        choose("backend", backend, "auto", "mmap", "webdataset")
        choose("on_bad_sample", on_bad_sample, "raise", "skip")
        require(size is None or len(size) == 2, "argument `image_size` to be one number or two", image_size)
        expected = "argument `sampling` to be 'hashed' with cached features, which come from smoothly resized frames"
        require(features is None or not reference, expected, repr(sampling), advice="Leave `features` out.")
        expected = "argument `features` to be set and `masks_in_training` to be off for features_only=True"
        cached = features is not None and not masks_in_training
        require(cached or not features_only, expected, repr(features), masks_in_training)
        self.patterns: dict[str, Patterns | None] = {"train": train, "validation": validation}
        self.patterns |= {"test": test, "predict": predict}
        for name, pattern in self.patterns.items():
            advice = "List the patterns; to draw from a set more often, list links to its shards under other names too."
            require(not isinstance(pattern, Mapping), f"argument `{name}` to be patterns", pattern, advice=advice)
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.has_background, self.mask_format = has_background, mask_format
        self.mean, self.std = tuple(mean), tuple(std)
        self.backend: Backend = backend
        self.features = features
        self.num_workers, self.start_method = num_workers, start_method
        self.shuffle_buffer = shuffle_buffer
        self.skip_bad = on_bad_sample == "skip"
        reading = {"max_bytes": max_member_bytes, "skip_bad": self.skip_bad}
        self._reading: dict[str, Any] = {"clips_per_video": clips_per_video, **reading}
        self.bad_samples: dict[str, str] = {}
        pixels: dict[str, Any] = {"resize_mode": resize_mode, "crop": crop, "mean": mean, "std": std}
        size = None if size is None else (int(size[0]), int(size[1]))
        self.transform = BatchTransform(size, has_background=has_background, reference=reference, **pixels)
        evaluation = SampleRules(image_size=size, crop=crop, max_objects=max_objects, seed=seed)
        training = replace(
            evaluation,
            clip_length=clip_length,
            frame_stride=frame_stride,
            flip_probability=flip_probability,
            masks=masks_in_training,
            reference=reference,
            video=not features_only,
        )
        with_masks = replace(evaluation, masks=True)
        self._rules = {"train": training, "validation": with_masks, "test": with_masks, "predict": evaluation}
        channels = mask_format == "channels" or not has_background
        self.ignore_overlaps = channels if ignore_overlaps is None else ignore_overlaps
        self._datasets: dict[str, ShardDataset | ShardStream] = {}
        self._resumed: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Opens the sets of a stage."""
        named = None if stage is None else str(getattr(stage, "value", stage))  # Lightning names stages by an enum
        wanted = tuple(self.patterns) if named is None else _SPLITS.get(named, (named,))
        given = named is None or self.patterns[wanted[0]] is not None
        require(given, f"argument `{wanted[0]}` to name shards for the stage {named!r}", None, advice="Set it.")
        for split in wanted:
            pattern = self.patterns[split]
            if pattern is not None and split not in self._datasets:
                self._datasets[split] = self._open(split, pattern)

    def train_dataloader(self) -> ShardLoader:
        """Builds the training loader of this process."""
        loader = self._loader("train")
        data = loader.dataset
        expected = f"argument `train` to hold batch_size={self.batch_size} clips for each of {data.world} processes"
        enough = data.clips is None or len(data) > 0
        require(enough, expected, data.clips, advice="Lower `batch_size`, or raise `clips_per_video`.")
        if self._resumed:
            loader.load_state_dict(self._resumed)
            self._resumed = {}
        return loader

    def val_dataloader(self) -> ShardLoader | list[ShardLoader]:
        """Builds the validation loader of this process."""
        return self._loader("validation") if self.patterns["validation"] is not None else []

    def test_dataloader(self) -> ShardLoader:
        """Builds the test loader of this process."""
        return self._loader("test")

    def predict_dataloader(self) -> ShardLoader:
        """Builds the prediction loader of this process, whose videos come without masks."""
        return self._loader("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Transforms a batch on its device; see `BatchTransform`."""
        if not isinstance(batch, dict) or "crop" not in batch:
            return batch  # a model's `example_input_array` passes here too
        mend_resume(self.trainer)
        batch = self.transform(batch)
        precision = getattr(self.trainer, "precision_plugin", None)
        # Lightning converts batches before this hook, when frames are bytes still.
        return batch if precision is None else precision.convert_input(batch)

    def state_dict(self) -> dict[str, Any]:
        """Says how far the training pass has come, for the checkpoint."""
        loader = getattr(self.trainer, "train_dataloader", None)
        return loader.state_dict() if isinstance(loader, ShardLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next training loader go on where the checkpoint stopped."""
        # Lightning itself restores loaders only where nobody asked for the number of steps before. It hands the state
        # over for `validate` and `predict` as well: a later `fit` begins afresh.
        fitting = self.trainer is None or self.trainer.state.fn in (None, "fit")
        self._resumed = dict(state_dict) if fitting else {}

    def _open(self, split: str, pattern: Patterns) -> ShardDataset | ShardStream:
        rules, source = self._rules[split], open_source(pattern, split, self.backend)
        expected = f"argument `{split}` to be plain local tars for cached features"
        advice = "Download and unpack the shards, or leave `features` out."
        require(self.features is None or source.mapped, expected, source.shards[0], advice=advice)
        if not source.mapped:
            stored: Any = self.mask_format
            if stored == "auto":
                stored = "ids" if self.has_background else "channels"
            return ShardStream(source, replace(rules, mask_format=stored), self.shuffle_buffer, **self._reading)
        store = None
        if self.features is not None:
            from ssync_pl.data.features.store import FeatureStore

            store = FeatureStore(
                str(self.features),
                list(zip(source.shards, source.entries or [], strict=True)),
                image_size=self.transform.image_size,
                resize_mode=self.transform.resize_mode,
                crop=self.transform.crop,
                flips=rules.training and rules.flip_probability > 0,
            )
        dataset = ShardDataset(source, rules, store, **self._reading)
        if rules.masks:
            dataset.settle_masks(split, self.mask_format)
        return dataset

    def _loader(self, split: str) -> ShardLoader:
        expected = f"argument `{split}` to name shards and `setup` to have run"
        require(split in self._datasets, expected, "no such set", advice=f"Set `{split}`, or call `setup`.")
        dataset, trainer, training = self._datasets[split], self.trainer, split == "train"
        dataset.batch_size = self.batch_size if training else self.val_batch_size
        dataset.rank, dataset.world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        device = None if trainer is None else trainer.strategy.root_device
        return ShardLoader(
            dataset,
            trainer if training else None,
            # Only CUDA copies overlap with what the device computes.
            device=device if device is not None and device.type == "cuda" else None,
            on_bad=self.count_bad,
            leave_out=not training and dataset.world == 1,  # ranks need equally many batches
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=self.start_method if self.num_workers else None,
            pin_memory=torch.cuda.is_available() and (device is None or device.type == "cuda"),
        )

    def teardown(self, stage: str) -> None:
        """Says at the end of a stage how many samples were skipped."""
        if self.bad_samples:
            _logger.warning("Skipped because they could not be read: %d samples", len(self.bad_samples))

    def count_bad(self, bad: list[tuple[str, str]]) -> None:
        """Counts and logs samples that were skipped, as (place, message), each once."""
        for place, message in bad:
            if place not in self.bad_samples:
                self.bad_samples[place] = message
                _logger.warning("Skipping a bad sample (%d so far): %s", len(self.bad_samples), message)
