"""Lightning data modules: over user shards, and over the synthetic set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader

from ssync_pl.data import synthetic
from ssync_pl.data.dataset import BAD_SAMPLES, Collate, ShardDataset, split_short
from ssync_pl.data.index import ShardEntry, load_shards
from ssync_pl.data.patterns import expand_shards, is_remote
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.sampling import EvalSampler, TrainSampler
from ssync_pl.data.stream import PassLoader, ShardStream, fetch_index
from ssync_pl.data.transforms import BatchTransform
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["ShardDataModule", "SyntheticDataModule"]

_logger = logging.getLogger(__name__)

Loader = DataLoader[dict[str, Any]]

# Sets that a stage, or a verb of the Trainer, reads
_SPLITS: dict[str, tuple[str, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class ShardDataModule(L.LightningDataModule):
    """Videos from tar shards of the field (MOVi, YT-VIS, …), local or remote, read unchanged.

    Training draws one random clip a video and pass; evaluation takes every whole video exactly once at any number of
    processes. Workers send uint8; resizing, cropping, flipping and normalising happen on the device, in
    `on_after_batch_transfer`. Every random choice is a function of (seed, pass, key): local sets give the same
    batches whatever the number of workers and the start method. Lightning's trainer gives the rank, so
    `use_distributed_sampler` may stay on.

    Batches are dicts: `video` (B, T, 3, H, W) float32; `__key__`; in evaluation `segmentations` (B, T, C, H, W) bool,
    `batch_padding_mask` (B,) bool (`False` = a repeat that must not be counted), `frame_mask` (B, T) bool (`False` =
    padding of a shorter video).

    Args:
        train: Training shards: a path, URL or pattern (`movi_c-train-{000000..000304}.tar`, `train-*.tar`), or several.
        validation: Validation shards; `None` validates nothing.
        test: Test shards.
        predict: Shards for `predict`; masks are not read.
        batch_size: Clips a batch and process.
        val_batch_size: Videos a batch and process in evaluation; `None` takes `batch_size`.
        clip_length: Frames of a training clip.
        frame_stride: Distance between the frames of a clip, in frames.
        clips_per_video: Clips of each video a pass.
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
        num_workers: Worker processes a loader.
        prefetch_factor: Batches each worker keeps ready; `None` takes PyTorch's default.
        persistent_workers: Keep workers from pass to pass.
        pin_memory: Page-locked batches for faster copies to CUDA; `auto` does so exactly on CUDA.
        start_method: How workers start: `fork`, `spawn` or `forkserver`; `None` takes Python's default.
        shuffle_buffer: Clips held back to be mixed, a worker; remote training sets only.
        seed: Seed of all random choices.
        on_bad_sample: `raise`, or `skip`: log the sample once, count it in `bad_samples` and put another in its place
            (in evaluation, one that is not counted).

    Raises:
        ConfigError: A setting is out of range, or settings contradict each other.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from ssync_pl.data.shards import ShardWriter
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ShardWriter(folder, "train") as writer:
        ...         for index in range(4):
        ...             writer.write(str(index), {"video.npy": np.zeros((6, 8, 8, 3), np.uint8)})
        ...     data = ShardDataModule(f"{folder}/train-*.tar", batch_size=2, image_size=16, num_workers=0)
        ...     data.setup("fit")
        ...     batch = next(iter(data.train_dataloader()))
        ...     data.on_after_batch_transfer(batch, 0)["video"].shape
        torch.Size([2, 4, 3, 16, 16])
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
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
        on_bad_sample: Literal["raise", "skip"] = "raise",
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
        ):
            if value is not None and value < least:
                raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        for name, choice, known in (
            ("mask_format", mask_format, ("auto", "ids", "channels")),
            ("on_bad_sample", on_bad_sample, ("raise", "skip")),
        ):
            if choice not in known:
                raise ConfigError(f"Expected argument `{name}` to be one of {', '.join(known)}, but got {choice!r}.")
        if max_objects is not None and max_objects > 254:
            raise ConfigError(f"Expected argument `max_objects` to be at most 254, but got {max_objects}.")
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        size = None if size is None else (int(size[0]), int(size[1]))
        self.patterns = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.clips_per_video = clips_per_video
        self.masks_in_training = masks_in_training
        self.has_background = has_background
        self.mean, self.std = tuple(mean), tuple(std)
        self.mask_format = mask_format
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.pin_memory = pin_memory
        self.start_method = start_method
        self.shuffle_buffer = shuffle_buffer
        self.on_bad_sample = on_bad_sample
        self.bad_samples: dict[str, str] = {}
        self.transform = BatchTransform(
            size, resize_mode=resize_mode, crop=crop, mean=mean, std=std, has_background=has_background
        )
        evaluation = SampleRules(image_size=size, crop=crop, max_objects=max_objects, seed=seed)
        training = replace(
            evaluation,
            clip_length=clip_length,
            frame_stride=frame_stride,
            flip_probability=flip_probability,
            masks=masks_in_training,
        )
        with_masks = replace(evaluation, masks=True)
        self._rules = {"train": training, "validation": with_masks, "test": with_masks, "predict": evaluation}
        channels = mask_format == "channels" or not has_background
        self.ignore_overlaps = channels if ignore_overlaps is None else ignore_overlaps
        self._local: dict[str, ShardDataset] = {}
        self._remote: dict[str, tuple[list[str], list[ShardEntry] | None]] = {}

    def prepare_data(self) -> None:
        """Check the patterns of the stage and write missing `index.json` files, once a machine."""
        verb = None if self.trainer is None else self.trainer.state.fn
        wanted = _SPLITS.get(verb, tuple(self.patterns)) if isinstance(verb, str) else tuple(self.patterns)
        for split, pattern in self.patterns.items():
            if pattern is not None and split in wanted:
                shards = expand_shards(pattern, split)
                if not is_remote(shards[0]):
                    load_shards(shards)

    def setup(self, stage: str | None = None) -> None:
        """Open the sets of a stage.

        Args:
            stage: `fit`, `validate`, `test`, `predict`, or `None` for all that are set.

        Raises:
            ConfigError: The set that the stage needs is not given.
        """
        if stage is None:
            wanted: tuple[str, ...] = tuple(self.patterns)
        else:
            wanted = _SPLITS.get(stage, (stage,))
        if stage is not None and self.patterns[wanted[0]] is None:
            raise ConfigError(
                f"Expected argument `{wanted[0]}` to name shards for the stage {stage!r}, but got None. Set it."
            )
        for split in wanted:
            pattern = self.patterns[split]
            if pattern is None or split in self._local or split in self._remote:
                continue
            shards = expand_shards(pattern, split)
            if is_remote(shards[0]):
                self._open_remote(split, shards)
            else:
                self._local[split] = self._open_local(split, shards)

    def train_dataloader(self) -> Loader:
        """Build the training loader of this process.

        Returns:
            Batches of clips; each pass has equally many on every process.

        Raises:
            ConfigError: There are fewer clips than one batch on each process.
        """
        rank, world = self._place()
        rules = self._rules["train"]
        options = self._options(self.batch_size)
        if "train" in self._local:
            dataset = self._local["train"]
            self._require_batch(len(dataset), world)
            sampler = TrainSampler(len(dataset), rules.seed, rank, world)
            return DataLoader(dataset, sampler=sampler, drop_last=True, collate_fn=Collate(dataset.rules), **options)
        urls, entries = self._opened_remote("train")
        if entries is not None:
            self._require_batch(sum(len(entry.samples) for entry in entries) * self.clips_per_video, world)
        stream = self._stream(urls, entries, rules, self.batch_size)
        return PassLoader(stream, self._current_pass, drop_last=True, collate_fn=Collate(rules), **options)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Build the validation loader of this process.

        Returns:
            Batches of whole videos, or an empty list when no validation shards are set.
        """
        return self._eval_loader("validation") if self.patterns["validation"] is not None else []

    def test_dataloader(self) -> Loader:
        """Build the test loader of this process.

        Returns:
            Batches of whole videos.
        """
        return self._eval_loader("test")

    def predict_dataloader(self) -> Loader:
        """Build the prediction loader of this process.

        Returns:
            Batches of whole videos without masks.
        """
        return self._eval_loader("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Transform a batch on its device; see `BatchTransform`.

        Args:
            batch: What a loader of this module gives.
            dataloader_idx: Not needed: the batch says how it was cut.

        Returns:
            The batch that hosts see.
        """
        if not isinstance(batch, dict) or BAD_SAMPLES not in batch:
            return batch  # a model's `example_input_array` passes here too
        self._count_bad(batch[BAD_SAMPLES])
        return self.transform({name: value for name, value in batch.items() if name != BAD_SAMPLES})

    def teardown(self, stage: str | None = None) -> None:
        """Close the memory maps of this process.

        Args:
            stage: Not needed.
        """
        for dataset in self._local.values():
            dataset.close()

    def _open_local(self, split: str, paths: list[str]) -> ShardDataset:
        entries = load_shards(paths)
        rules = self._rules[split]
        if rules.clip_length is not None:
            entries = [self._drop_short(path, entry) for path, entry in zip(paths, entries, strict=True)]
        dataset = ShardDataset(paths, entries, rules, self.clips_per_video, self.on_bad_sample == "skip")
        if rules.masks:
            most = partial(self._over_videos, dataset)
            found = self.mask_format
            if found == "auto":
                found = "channels" if most(dataset.mask_channels) > 1 else "ids"
            limit = rules.max_objects
            if limit is None:
                limit = max(most(partial(dataset.count_objects, mask_format=found)), 1)
            if found == "ids" and limit > 255:
                raise ShardError(
                    f"Expected object ids of 255 at most in the masks of `{split}`, but the largest is {limit}: ids "
                    "leave the workers as uint8. Renumber them from 1 in each video."
                )
            dataset.rules = replace(rules, mask_format=found, max_objects=limit)
        return dataset

    def _over_videos(self, dataset: ShardDataset, look: Callable[[int], int]) -> int:
        most = 0
        for video in range(len(dataset.samples)):
            try:
                most = max(most, look(video))
            except ShardError:
                if self.on_bad_sample == "raise":
                    raise
        return most

    def _drop_short(self, path: str, entry: ShardEntry) -> ShardEntry:
        rules = self._rules["train"]
        kept, short = split_short(entry, rules.clip_length or 1, rules.frame_stride)
        for sample in short:
            message = (
                f"Expected {path}, key {sample.key} to have enough frames for a clip (clip_length={rules.clip_length}, "
                f"frame_stride={rules.frame_stride}), but it has {sample.frames}. Shorten the clip, or set "
                "on_bad_sample='skip'."
            )
            if self.on_bad_sample == "raise":
                raise ShardError(message)
            self._count_bad([(f"{path}, key {sample.key}", message)])
        return kept

    def _open_remote(self, split: str, urls: list[str]) -> None:
        entries = fetch_index(urls)
        rules = self._rules[split]
        for url, entry in zip(urls, entries or [], strict=False):
            if rules.clip_length is not None and self.on_bad_sample == "raise":
                self._drop_short(url, entry)
        if self.mask_format == "auto":
            rules = replace(rules, mask_format="ids" if self.has_background else "channels")
        else:
            rules = replace(rules, mask_format=self.mask_format)
        self._rules[split] = rules
        self._remote[split] = (urls, entries)

    def _opened_remote(self, split: str) -> tuple[list[str], list[ShardEntry] | None]:
        if split not in self._remote:
            raise ConfigError(
                f"Expected argument `{split}` to name shards and `setup` to have run, but there is no such set. Set "
                f"`{split}`, and call `setup` when no trainer does."
            )
        return self._remote[split]

    def _eval_loader(self, split: str) -> Loader:
        rank, world = self._place()
        options = self._options(self.val_batch_size)
        if split in self._local:
            dataset = self._local[split]
            sampler = EvalSampler(len(dataset), rank, world)
            return DataLoader(dataset, sampler=sampler, collate_fn=Collate(dataset.rules), **options)
        urls, entries = self._opened_remote(split)
        rules = self._rules[split]
        stream = self._stream(urls, entries, rules, self.val_batch_size)
        return DataLoader(stream, collate_fn=Collate(rules), **options)

    def _stream(
        self, urls: list[str], entries: list[ShardEntry] | None, rules: SampleRules, batch_size: int
    ) -> ShardStream:
        rank, world = self._place()
        skip = self.on_bad_sample == "skip"
        return ShardStream(
            urls, entries, rules, batch_size, rank, world, self.clips_per_video, skip, self.shuffle_buffer
        )

    def _options(self, batch_size: int) -> dict[str, Any]:
        pin = self.pin_memory
        if pin == "auto":
            on_cuda = self.trainer is None or self.trainer.strategy.root_device.type == "cuda"
            pin = torch.cuda.is_available() and on_cuda
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": self.num_workers, "pin_memory": pin}
        if self.num_workers > 0:
            options["persistent_workers"] = self.persistent_workers
            options["prefetch_factor"] = self.prefetch_factor
            options["multiprocessing_context"] = self.start_method
        return options

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _current_pass(self) -> int:
        return 0 if self.trainer is None else self.trainer.current_epoch

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


class SyntheticDataModule(ShardDataModule):
    """The packaged data set: rendered videos of colliding bodies with exact masks, made on first use.

    Args:
        root: Folder of the generated sets; each configuration has a folder of its own in it.
        preset: Name of the scene configuration: `a` (plain colours), `a_zoom` (plain, larger objects), `c` (textured).
        num_train: Training videos.
        num_validation: Validation videos; also the sets of `test` and `predict`.
        resolution: Height and width of the stored frames.
        frames: Frames of a video.
        data_seed: Seed of the scenes.
        generate_workers: Processes that render; `None` takes the generator's default.
        scene: Further fields of the scene configuration to replace, for example `{"zoom": 1.25}`.
        **loader: All options of `ShardDataModule` but the shards. `max_objects` is the configuration's unless given.

    Raises:
        ConfigError: A setting is out of range, or `scene` names no field of the configuration.

    Example:
        >>> data = SyntheticDataModule(preset="a", num_train=16, num_validation=4, batch_size=4)
        >>> data.batch_size
        4
    """

    def __init__(
        self,
        root: str = "data/synthetic",
        preset: str = "a",
        num_train: int = 440,
        num_validation: int = 48,
        resolution: int = 64,
        frames: int = 12,
        data_seed: int = 0,
        generate_workers: int | None = None,
        scene: dict[str, Any] | None = None,
        **loader: Any,
    ) -> None:
        super().__init__(train=None, validation=None, test=None, predict=None, **loader)
        self.root = root
        self.splits = {"train": num_train, "validation": num_validation}
        self.data_seed = data_seed
        self.generate_workers = generate_workers
        # Settings are checked here, before anything is rendered.
        changes = {"resolution": resolution, "frames": frames, **(scene or {})}
        self.config = synthetic.preset(preset, **changes)
        self.folder = synthetic.dataset_folder(root, self.config, self.splits, data_seed)
        for split, rules in self._rules.items():
            if rules.max_objects is None:
                self._rules[split] = replace(rules, max_objects=self.config.max_objects)

    def prepare_data(self) -> None:
        """Render the videos unless they are there; Lightning calls this on one process a machine."""
        self._generate()

    def setup(self, stage: str | None = None) -> None:
        """Open the sets of a stage.

        Args:
            stage: `fit`, `validate`, `test`, `predict`, or `None` for all.
        """
        folder = self._generate()
        for split in self.patterns:
            part = "train" if split == "train" else "validation"
            self.patterns[split] = str(folder / f"{self.config.name}-{part}-*.tar")
        super().setup(stage)

    def _generate(self) -> Path:
        return synthetic.generate(
            self.root, self.config, self.splits, seed=self.data_seed, num_workers=self.generate_workers
        )
