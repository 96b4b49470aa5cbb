"""The Lightning data module of the synthetic set."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssync_pl.data import synthetic
from ssync_pl.data.datamodule import ShardDataModule
from ssync_pl.data.patterns import expand_shards
from ssync_pl.errors import require


class SyntheticDataModule(ShardDataModule):
    """The packaged data set: rendered videos of colliding bodies with exact masks, made on first use.

    Args:
        root: Folder of the generated sets; each configuration has a folder of its own in it.
        preset: Name of the scene configuration: `a` (plain colours), `a_zoom` (plain, larger objects), `c` (textured).
        num_train: Training videos.
        num_validation: Validation videos; also the sets of `test` and `predict`.
        resolution: Height and width of the stored frames.
        frames: Frames per video.
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
        # Settings are checked here, before anything is rendered.
        self.config = synthetic.preset(preset, **{"resolution": resolution, "frames": frames, **(scene or {})})
        splits = {"train": num_train, "validation": num_validation}
        self._recipe = (root, self.config, splits, data_seed)
        self.generate_workers = generate_workers
        folder = synthetic.dataset_folder(*self._recipe)
        self._cache = (cache_backbone, cache_layer, cache_components)
        fits = cache_backbone is not None or self._cache == (None, None, None)
        expected = "`cache_layer` and `cache_components` beside `cache_backbone` only"
        require(fits, expected, repr(cache_layer), repr(cache_components), advice="Name the backbone.")
        if cache_backbone is not None:
            given, expected = loader.get("features"), "either `features` or `cache_backbone`"
            require(given is None, expected, repr(given), repr(cache_backbone), advice="Leave one out.")
            loader["image_size"] = loader.get("image_size") or self.config.resolution
            settings = [*self._cache, *(loader.get(name) for name in ("image_size", "resize_mode", "crop"))]
            settings.append(loader.get("flip_probability", 0.5) > 0)
            digest = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:8]
            loader["features"] = str(folder.with_name(f"{folder.name}-{cache_backbone}-{digest}"))
        train, validation = (str(folder / f"{self.config.name}-{split}-*.tar") for split in splits)
        super().__init__(train=train, validation=validation, test=validation, predict=validation, **loader)
        for split, rules in self._rules.items():
            self._rules[split] = replace(rules, max_objects=rules.max_objects or self.config.max_objects)

    def prepare_data(self) -> None:
        """Renders the videos and stores their features unless they are there, once per machine."""
        synthetic.generate(*self._recipe, self.generate_workers)
        name, layer, components = self._cache
        if name is None or self.features is None:
            return
        parts = [expand_shards(str(self.patterns[split])) for split in ("train", "validation")]
        if all((Path(self.features) / Path(shard).name).is_file() for shards in parts for shard in shards):
            return
        # Deferred: the backbone's packages are extras.
        from ssync_pl.data.features import backbone_by_name
        from ssync_pl.data.features.cache import cache_features

        backbone, rules = backbone_by_name(name, layer), self._rules["train"]
        for shards in parts:  # training videos first: a projection is fitted to them
            cache_features(
                shards,
                backbone,
                self.features,
                image_size=self.transform.image_size or self.config.resolution,
                resize_mode=self.transform.resize_mode,
                crop=rules.crop,
                flips=rules.flip_probability > 0,
                components=components,
            )

    def setup(self, stage: str | None = None) -> None:
        """Opens the sets of a stage."""
        synthetic.generate(*self._recipe, self.generate_workers)
        super().setup(stage)
