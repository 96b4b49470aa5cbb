"""The Lightning data module over shards."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as L
import torch

from ssync_pl.data.dataset import Collate, ShardDataset
from ssync_pl.data.decode import MAX_MEMBER_BYTES
from ssync_pl.data.index import load_shards
from ssync_pl.data.loader import EvalSampler, ShardLoader, TrainerClock, TrainSampler
from ssync_pl.data.patterns import Patterns, find_shards, is_compressed, is_remote
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.sources import Backend, ShardSource, open_source, settle_masks
from ssync_pl.data.stream import ShardStream
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.errors import ConfigError, ShardError

if TYPE_CHECKING:
    from ssync_pl.data.features.store import FeatureStore

__all__ = ["ShardDataModule"]

_logger = logging.getLogger(__name__)

# Sets that a stage, or a verb of the Trainer, reads
_SPLITS: dict[str, tuple[str, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class ShardDataModule(L.LightningDataModule):
    """Videos from tar shards of the field (MOVi, YT-VIS, …), local or remote, read unchanged.

    Training draws one random clip per video and pass; evaluation takes every whole video exactly once at any number of
    processes. Workers send uint8, copied to CUDA while the step before computes; resizing, cropping, flipping and
    normalising happen on the device, in `on_after_batch_transfer`. Every random choice is a function of (seed, pass,
    key), and batches of local plain tars do not depend on the number of workers: a run that was interrupted in the
    middle of a pass goes on with the batch that was next. A stream goes on at the start of a shard. Lightning's trainer
    gives the rank, so `use_distributed_sampler` may stay on.

    Batches are dicts: `video` (B, T, 3, H, W) float32; `__key__`; in evaluation `segmentations` (B, T, C, H, W) bool,
    `batch_padding_mask` (B,) bool (`False` = a repeat that must not be counted), `frame_mask` (B, T) bool (`False` =
    padding of a shorter video).

    Args:
        train: Training shards: a path, URL or pattern (`movi_c-train-{000000..000304}.tar`, `train-*.tar`), or several.
            Patterns with weights, `{"movi/*.tar": 3, "mine/*.tar": 1}`, mix sets: a pass is as long as all together,
            and of four clips three come from the first.
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
            channel an object. `auto` looks: more than one channel anywhere means `channels`; remote sets are taken as
            `ids` when `has_background`, else as `channels`.
        ignore_overlaps: Leave pixels with several true masks out of the scores, for hosts that ask. `None` does so for
            sets whose objects have channels of their own, which may overlap (YT-VIS, COCO).
        max_objects: Object channels of `segmentations`, without the background. `None` counts them, reading every mask
            once (remote sets: the most of each batch). MOVi-C has 10, MOVi-E 23, YT-VIS takes 25.
        num_workers: Worker processes per loader.
        prefetch_factor: Batches each worker keeps ready; `None` takes PyTorch's default.
        persistent_workers: Keep workers from pass to pass.
        pin_memory: Page-locked batches for faster copies to CUDA; `auto` does so exactly on CUDA.
        start_method: How workers start: `fork`, `spawn` or `forkserver`; `None` takes Python's default.
        shuffle_buffer: Clips that each worker of a stream holds back to be mixed in training; local plain tars are
            mixed as a whole.
        seed: Seed of all random choices.
        sampling: `hashed` lets a clip start at any frame. `reference` does as published VideoSAUR-style pipelines, for
            comparisons: a clip starts at a multiple of its length, resizing does not smooth, `center` cuts the central
            square first in evaluation.
        backend: `mmap` reads plain local tars in place; `webdataset` streams, from disk or URLs, packed tars too;
            `auto` reads in place what can be.
        features: Folder that `ssync-pl data cache-features` wrote for these shards; batches then hold `features`
            (B, T, N, D) float32. Local sets only.
        features_only: Leave the frames out of training batches, for hosts that read nothing but `features`.
        on_bad_sample: `raise`, or `skip`: log the sample once, count it in `bad_samples` and put another in its place
            (in evaluation, one that is not counted). A shard that is cut off is always refused.
        max_member_bytes: Most bytes of one member of a shard, as it is stored and as it is decoded (pictures, videos
            and packed arrays); larger ones are bad samples.
        allow_pipe: Accept `pipe:COMMAND` for shards. The command runs in a shell, so only take it from people you
            trust.

    Raises:
        ConfigError: A setting is out of range, or settings contradict each other.
    """

    def __init__(
        self,
        train: Patterns | None = None,
        validation: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
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
        prefetch_factor: int | None = None,
        persistent_workers: bool = True,
        pin_memory: bool | Literal["auto"] = "auto",
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
        shuffle_buffer: int = 64,
        seed: int = 0,
        sampling: Literal["hashed", "reference"] = "hashed",
        backend: Backend = "auto",
        features: str | None = None,
        features_only: bool = False,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        max_member_bytes: int = MAX_MEMBER_BYTES,
        allow_pipe: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("clip_length", clip_length, 1),
            ("frame_stride", frame_stride, 1),
            ("clips_per_video", clips_per_video, 1),
            ("max_objects", max_objects, 1),
            ("num_workers", num_workers, 0),
            ("prefetch_factor", prefetch_factor, 1),
            ("shuffle_buffer", shuffle_buffer, 0),
            ("max_member_bytes", max_member_bytes, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        for name, choice, known in (
            ("mask_format", mask_format, ("auto", "ids", "channels")),
            ("sampling", sampling, ("hashed", "reference")),
            ("backend", backend, ("auto", "mmap", "webdataset")),
            ("on_bad_sample", on_bad_sample, ("raise", "skip")),
        ):
            if choice not in known:
                raise ConfigError(f"Expected argument `{name}` to be one of {', '.join(known)}, but got {choice!r}.")
        if max_objects is not None and max_objects > 254:
            raise ConfigError(f"Expected argument `max_objects` to be at most 254, but got {max_objects}.")
        if not isinstance(image_size, (int, type(None))) and len(image_size) != 2:
            raise ConfigError(f"Expected argument `image_size` to be one number or two, but got {image_size}.")
        if features is not None and sampling == "reference":
            raise ConfigError(
                "Expected argument `sampling` to be 'hashed' with cached features, which were computed from smoothly "
                "resized frames, but got 'reference'. Leave `features` out, or take 'hashed'."
            )
        if features_only and (features is None or masks_in_training):
            raise ConfigError(
                "Expected argument `features` to be set and `masks_in_training` to be off for features_only=True, but "
                f"got features={features!r}, masks_in_training={masks_in_training}."
            )
        for name, pattern in (("validation", validation), ("test", test), ("predict", predict)):
            if isinstance(pattern, dict):
                raise ConfigError(
                    f"Expected weights only in argument `train`, but got {pattern} in `{name}`. Use a list."
                )
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        size = None if size is None else (int(size[0]), int(size[1]))
        self.patterns: dict[str, Patterns | None] = {
            "train": train,
            "validation": validation,
            "test": test,
            "predict": predict,
        }
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.clips_per_video = clips_per_video
        self.masks_in_training = masks_in_training
        self.has_background = has_background
        self.mean, self.std = tuple(mean), tuple(std)
        self.mask_format = mask_format
        self.backend: Backend = backend
        self.features = features
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.pin_memory = pin_memory
        self.start_method = start_method
        self.shuffle_buffer = shuffle_buffer
        self.on_bad_sample = on_bad_sample
        self.max_member_bytes = max_member_bytes
        self.allow_pipe = allow_pipe
        self.bad_samples: dict[str, str] = {}
        self.transform = BatchTransform(
            size,
            resize_mode=resize_mode,
            crop=crop,
            mean=mean,
            std=std,
            has_background=has_background,
            reference=sampling == "reference",
        )
        evaluation = SampleRules(image_size=size, crop=crop, max_objects=max_objects, seed=seed)
        training = replace(
            evaluation,
            clip_length=clip_length,
            frame_stride=frame_stride,
            flip_probability=flip_probability,
            masks=masks_in_training,
            reference=sampling == "reference",
            video=not features_only,
        )
        with_masks = replace(evaluation, masks=True)
        self._rules = {"train": training, "validation": with_masks, "test": with_masks, "predict": evaluation}
        channels = mask_format == "channels" or not has_background
        self.ignore_overlaps = channels if ignore_overlaps is None else ignore_overlaps
        self._sources: dict[str, ShardSource] = {}
        self._datasets: dict[str, ShardDataset] = {}
        # Weak: a loader in a reference cycle lives on until some forked worker collects it, with its own workers.
        self._train_loader: weakref.ref[ShardLoader] | None = None
        self._train_state: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Check the patterns of the stage and write missing `index.json` files, once a machine."""
        verb = None if self.trainer is None else self.trainer.state.fn
        wanted = _SPLITS.get(verb, tuple(self.patterns)) if isinstance(verb, str) else tuple(self.patterns)
        for split, pattern in self.patterns.items():
            if pattern is not None and split in wanted:
                shards, _, _ = find_shards(pattern, split, allow_pipe=self.allow_pipe)
                if not is_remote(shards[0]) and not any(is_compressed(shard) for shard in shards):
                    load_shards(shards)

    def setup(self, stage: str | None = None) -> None:
        """Open the sets of a stage."""
        if stage is None:
            wanted: tuple[str, ...] = tuple(self.patterns)
        else:
            wanted = _SPLITS.get(stage, (stage,))
        if stage is not None and self.patterns[wanted[0]] is None:
            named = str(getattr(stage, "value", stage))  # Lightning names stages by an enumeration
            raise ConfigError(
                f"Expected argument `{wanted[0]}` to name shards for the stage {named!r}, but got None. Set it."
            )
        for split in wanted:
            pattern = self.patterns[split]
            if pattern is not None and split not in self._sources:
                self._open(split, open_source(pattern, split, self.backend, allow_pipe=self.allow_pipe))

    def train_dataloader(self) -> ShardLoader:
        """Build the training loader of this process."""
        rank, world = self._place()
        source, rules = self._opened("train"), self._rules["train"]
        if source.videos is not None:
            self._require_batch(source.videos * self.clips_per_video, world)
        if "train" not in self._datasets:
            loader = self._loader(self._stream(source, rules, self.batch_size), training=True)
        else:
            dataset = self._datasets["train"]
            sampler = TrainSampler(len(dataset), rules.seed, rank, world, source.mix(self.clips_per_video))
            loader = self._loader(dataset, training=True, sampler=sampler, drop_last=True)
        if self._train_state:
            loader.load_state_dict(self._train_state)
            self._train_state = {}
        self._train_loader = weakref.ref(loader)
        return loader

    def val_dataloader(self) -> ShardLoader | list[ShardLoader]:
        """Build the validation loader of this process."""
        return self._eval_loader("validation") if self.patterns["validation"] is not None else []

    def test_dataloader(self) -> ShardLoader:
        """Build the test loader of this process."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ShardLoader:
        """Build the prediction loader of this process, whose videos come without masks."""
        return self._eval_loader("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Transform a batch on its device; see `BatchTransform`."""
        if not isinstance(batch, dict) or "crop" not in batch:
            return batch  # a model's `example_input_array` passes here too
        TrainerClock(self).note_epoch()
        batch = self.transform(batch)
        precision = getattr(self.trainer, "precision_plugin", None)
        # Lightning converts batches before this hook, when frames are bytes still.
        return batch if precision is None else precision.convert_input(batch)

    def teardown(self, stage: str | None = None) -> None:
        """Close the shards in this process."""
        for dataset in self._datasets.values():
            dataset.close()

    def state_dict(self) -> dict[str, Any]:
        """Say how far the training pass has come, for the checkpoint."""
        loader = None if self._train_loader is None else self._train_loader()
        return {} if loader is None else loader.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_train_loader": None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader go on where the checkpoint stopped."""
        # Lightning hands the state over for `validate` and `predict` as well: a later `fit` begins afresh.
        fitting = self.trainer is None or self.trainer.state.fn in (None, "fit")
        self._train_state = dict(state_dict) if fitting else {}

    def _open(self, split: str, source: ShardSource) -> None:
        rules = self._rules[split]
        if rules.clip_length is not None:
            kept, short = source.without_short(rules.clip_length, rules.frame_stride)
            for shard, sample in short:
                self._refuse_short(shard, sample.key, sample.frames, rules)
            # A stream meets the short videos of a shard anyway, and replaces them there.
            source = kept if source.mapped else source
        if self.features is not None and not source.mapped:
            raise ConfigError(
                f"Expected argument `{split}` to be plain local tars for cached features, but got {source.shards[0]} "
                f"(backend={self.backend!r}). Download and unpack the shards, or leave `features` out."
            )
        self._sources[split] = source
        if source.mapped:
            features = None if self.features is None else self._open_features(source, rules)
            skip = self.on_bad_sample == "skip"
            dataset = ShardDataset(
                source.shards,
                source.entries or [],
                rules,
                self.clips_per_video,
                skip,
                features,
                self.max_member_bytes,
            )
            if rules.masks:
                settle_masks(dataset, split, self.mask_format)
            self._datasets[split] = dataset
        elif self.mask_format != "auto":
            self._rules[split] = replace(rules, mask_format=self.mask_format)
        else:
            self._rules[split] = replace(rules, mask_format="ids" if self.has_background else "channels")

    def _open_features(self, source: ShardSource, rules: SampleRules) -> FeatureStore:
        from ssync_pl.data.features.store import FeatureStore

        return FeatureStore(
            str(self.features),
            list(zip(source.shards, source.entries or [], strict=True)),
            image_size=self.transform.image_size,
            resize_mode=self.transform.resize_mode,
            crop=self.transform.crop,
            flips=rules.training and rules.flip_probability > 0,
        )

    def _refuse_short(self, shard: str, key: str, frames: int | None, rules: SampleRules) -> None:
        message = (
            f"Expected {shard}, key {key} to have enough frames for a clip (clip_length={rules.clip_length}, "
            f"frame_stride={rules.frame_stride}), but it has {frames}. Shorten the clip, or set "
            "on_bad_sample='skip'."
        )
        if self.on_bad_sample == "raise":
            raise ShardError(message)
        self._count_bad([(f"{shard}, key {key}", message)])

    def _opened(self, split: str) -> ShardSource:
        if split not in self._sources:
            raise ConfigError(
                f"Expected argument `{split}` to name shards and `setup` to have run, but there is no such set. Set "
                f"`{split}`, and call `setup` when no trainer does."
            )
        return self._sources[split]

    def _eval_loader(self, split: str) -> ShardLoader:
        rank, world = self._place()
        source = self._opened(split)
        if split not in self._datasets:
            return self._loader(self._stream(source, self._rules[split], self.val_batch_size), training=False)
        dataset = self._datasets[split]
        return self._loader(dataset, training=False, sampler=EvalSampler(len(dataset), rank, world))

    def _stream(self, source: ShardSource, rules: SampleRules, batch_size: int) -> ShardStream:
        rank, world = self._place()
        if rules.training:
            source.mix(self.clips_per_video)  # refuses weights that leave a set out
        return ShardStream(
            source.shards,
            source.entries,
            rules,
            batch_size,
            rank,
            world,
            self.clips_per_video,
            self.on_bad_sample == "skip",
            self.shuffle_buffer,
            list(zip(source.sizes, source.weights, strict=False)),
            self.max_member_bytes,
        )

    def _loader(self, dataset: ShardDataset | ShardStream, *, training: bool, **extra: Any) -> ShardLoader:
        device = None if self.trainer is None else self.trainer.strategy.root_device
        if isinstance(dataset, ShardDataset):
            size = self.batch_size if training else self.val_batch_size
            extra |= {"collate_fn": Collate(dataset.rules), "batch_size": size}
        else:
            extra["batch_size"] = None  # a stream emits whole batches
        return ShardLoader(
            dataset,
            clock=TrainerClock(self) if training else None,
            # Only CUDA copies overlap with what the device computes.
            device=device if device is not None and device.type == "cuda" else None,
            on_bad=self._count_bad,
            # Ranks need equally many batches.
            leave_out=not training and self._place()[1] == 1,
            **self._options(),
            **extra,
        )

    def _options(self) -> dict[str, Any]:
        pin = self.pin_memory
        if pin == "auto":
            on_cuda = self.trainer is None or self.trainer.strategy.root_device.type == "cuda"
            pin = torch.cuda.is_available() and on_cuda
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": pin}
        if self.num_workers > 0:
            options["persistent_workers"] = self.persistent_workers
            options["prefetch_factor"] = self.prefetch_factor
            options["multiprocessing_context"] = self.start_method
        return options

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _require_batch(self, clips: int, world: int) -> None:
        if clips // world < self.batch_size:
            raise ConfigError(
                f"Expected argument `train` to hold at least batch_size={self.batch_size} clips for each of {world} "
                f"processes, but it holds {clips}. Lower `batch_size`, or raise `clips_per_video`."
            )

    def _count_bad(self, bad: list[tuple[str, str]]) -> None:
        for place, message in bad:
            if place not in self.bad_samples:
                self.bad_samples[place] = message
                _logger.warning("Skipping a bad sample (%d so far): %s", len(self.bad_samples), message)
