"""DAVIS 2017 from its pictures and palette masks.

Source: https://davischallenge.org/davis2017/code.html (folders, palette ids, 255 = void).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssync_pl.data.convert.media import list_pictures
from ssync_pl.data.convert.videos import read_video
from ssync_pl.data.convert.writer import Item, Split
from ssync_pl.errors import require

__all__ = ["Davis"]

_VOID = 255


@dataclass(frozen=True)
class Davis:
    """Convert DAVIS 2017: ROOT/JPEGImages/480p/VIDEO/00000.jpg, ROOT/Annotations/480p/VIDEO/00000.png and
    ROOT/ImageSets/2017/SPLIT.txt. Masks are ids (F, h, w, 1), 0 = background; void pixels (255) become background.
    """

    root: Path
    splits: tuple[str, ...] = ("train", "val")
    resolution: str = "480p"
    annotations: str = "Annotations"
    short_side: int | None = None

    def plan(self) -> list[Split]:
        """List the videos of each split; `ConfigError` when the folders or lists are not there."""
        pictures, masks = f"JPEGImages/{self.resolution}", f"{self.annotations}/{self.resolution}"
        for folder, option in ((pictures, "--resolution"), (masks, "--annotations")):
            found = (self.root / folder).is_dir()
            require(found, f"a folder {self.root / folder}", "none", advice=f"Check --root and {option}.")
        splits = []
        for split in dict.fromkeys(self.splits):
            sources = []
            for name in _names(self.root / "ImageSets" / "2017" / f"{split}.txt"):
                frames, place = list_pictures(self.root / pictures / name), f"{masks}/{name}"
                of_frames = {"path": place, "names": list_pictures(self.root / place, (".png",))}
                sources.append({"video": f"{pictures}/{name}", "names": frames, "masks": of_frames})
            splits.append(Split(f"davis-{'validation' if split == 'val' else split}", sources))
        return splits

    def __call__(self, item: Item) -> dict[str, Any]:
        """Make the members of one video; `ShardError` names what is damaged or does not fit."""
        return read_video(self.root, item.source, self.short_side, void=_VOID)


def _names(path: Path) -> list[str]:
    require(path.is_file(), f"the videos' names in {path}", "no such file", advice="Check --root and --splits.")
    names = path.read_text(encoding="utf-8").splitlines()
    names = [name.strip() for name in names if name.strip()]
    odd = [name for name in names if name in (".", "..") or any(mark in name for mark in "/\\")]
    got = repr(odd[0]) if odd else f"{len(names)} names, {len(set(names))} of them different"
    plain = not odd and 0 < len(names) == len(set(names))
    require(plain, f"one name of a video per line in {path}, each once", got)
    return names
