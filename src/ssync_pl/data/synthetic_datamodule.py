"""The Lightning data module of the synthetic set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ssync_pl.data import synthetic
from ssync_pl.data.datamodule import ShardDataModule

__all__ = ["SyntheticDataModule"]


class SyntheticDataModule(ShardDataModule):
    """The packaged data set: rendered videos of colliding bodies with exact masks, made on first use.

    Args:
        root: Folder of the generated sets; each configuration has a folder of its own in it.
        preset: Name of the scene configuration: `a` (plain colours), `a_zoom` (plain, larger objects), `c` (textured),
            `e` (textured, up to 23 objects, moving camera), `cluttered` (crowded).
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
