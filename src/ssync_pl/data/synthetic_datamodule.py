"""The Lightning data module of the synthetic set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssync_pl.data import synthetic
from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.patterns import find_shards
from ssync_pl.errors import ConfigError

__all__ = ["SyntheticDataModule"]


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
        cache_backbone: Frozen backbone whose features are stored beside the set on first use, as `ssync-pl data
            cache-features` does, for example `efficientnet_lite0`; batches then hold `features`. `None` stores none.
        cache_layer: Its layer; `None` takes the backbone's default.
        cache_components: Store this many principal components, fitted to the training videos; `None` stores them all.
        **loader: All options of `ShardDataModule` but the shards. `max_objects` is the configuration's unless given.

    Raises:
        ConfigError: A setting is out of range, `scene` names no field of the configuration, or both `features` and
            `cache_backbone` are given.
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
        cache_backbone: str | None = None,
        cache_layer: str | None = None,
        cache_components: int | None = None,
        **loader: Any,
    ) -> None:
        self.root = root
        self.splits = {"train": num_train, "validation": num_validation}
        self.data_seed = data_seed
        self.generate_workers = generate_workers
        # Settings are checked here, before anything is rendered.
        changes = {"resolution": resolution, "frames": frames, **(scene or {})}
        self.config = synthetic.preset(preset, **changes)
        self.folder = synthetic.dataset_folder(root, self.config, self.splits, data_seed)
        self._cache = (cache_backbone, cache_layer, cache_components)
        if cache_backbone is not None:
            size = loader.get("image_size") or self.config.resolution
            loader = {**loader, "image_size": size, "features": self._cache_folder({**loader, "image_size": size})}
        elif cache_layer is not None or cache_components is not None:
            raise ConfigError(
                f"Expected `cache_layer` and `cache_components` beside `cache_backbone` only, but got {cache_layer!r} "
                f"and {cache_components!r} alone. Name the backbone."
            )
        super().__init__(train=None, validation=None, test=None, predict=None, **loader)
        for split, rules in self._rules.items():
            if rules.max_objects is None:
                self._rules[split] = replace(rules, max_objects=self.config.max_objects)

    def prepare_data(self) -> None:
        """Render the videos unless they are there; Lightning calls this on one process a machine."""
        self._generate()
        self._store_features()

    def setup(self, stage: str | None = None) -> None:
        """Open the sets of a stage."""
        self._generate()
        for split in self.patterns:
            self.patterns[split] = self._pattern("train" if split == "train" else "validation")
        super().setup(stage)

    def _generate(self) -> None:
        synthetic.generate(self.root, self.config, self.splits, self.data_seed, self.generate_workers)

    def _pattern(self, part: str) -> str:
        return str(self.folder / f"{self.config.name}-{part}-*.tar")

    def _cache_folder(self, loader: dict[str, Any]) -> str:
        if loader.get("features") is not None:
            raise ConfigError(
                f"Expected either `features` or `cache_backbone`, but got {loader['features']!r} and "
                f"{self._cache[0]!r}. Leave one out."
            )
        settings = [*self._cache, *(loader.get(name) for name in ("image_size", "resize_mode", "crop"))]
        settings.append(loader.get("flip_probability", 0.5) > 0)
        digest = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:8]
        return str(self.folder.with_name(f"{self.folder.name}-{self._cache[0]}-{digest}"))

    def _store_features(self) -> None:
        name, layer, components = self._cache
        if name is None or self.features is None:
            return
        parts = [find_shards(self._pattern(part), part)[0] for part in ("train", "validation")]
        if _all_there(Path(self.features), [Path(shard).name for shards in parts for shard in shards]):
            return
        # Deferred: the backbone's packages are extras.
        from ssync_pl.data.features.backbone import backbone_by_name
        from ssync_pl.data.features.cache import cache_features

        backbone = backbone_by_name(name, layer)
        size = self.transform.image_size or (self.config.resolution, self.config.resolution)
        rules = self._rules["train"]
        for shards in parts:  # training videos first: a projection is fitted to them
            cache_features(
                shards,
                backbone,
                self.features,
                image_size=size,
                resize_mode=self.transform.resize_mode,
                crop=rules.crop,
                flips=rules.flip_probability > 0,
                components=components,
            )


def _all_there(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).is_file() for name in names)
