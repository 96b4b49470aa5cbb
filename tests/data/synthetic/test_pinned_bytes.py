"""The generator's videos and masks, byte for byte: who renders a set again gets the same one.

Sines and roots may differ by a bit between kinds of machines, so bytes are compared on the usual kind only.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssync_pl.data.synthetic import PRESETS, preset, render_scene, render_video

SMALL = {"resolution": 24, "frames": 5}
GOLDEN = Path(__file__).with_name("golden_renders.npz")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other roots")
@pytest.mark.parametrize(
    ("name", "changes", "seed", "index", "video", "masks", "facts"),
    [
        ("a", {}, 3, 1, "0e859d6d6fea6189", "075b12dd9746bfac", "a258bfe26ab858de"),
        ("a_zoom", {}, 3, 1, "54a11a4af196e40a", "ad718732711a356e", "3fe47b6d692ea678"),
        ("c", {}, 3, 1, "1063d4c4617b0779", "075b12dd9746bfac", "42f14a64c414737a"),
        ("e", {}, 3, 1, "2066d5558b8e4798", "5bcde2a6a1b5e63f", "43814403c732a82c"),
        ("cluttered", {}, 3, 1, "fbd65a5e8c8cdfbb", "d0a89489736bf63a", "4ab7663bf9ebfce5"),
        ("a", {"antialias": 1}, 0, 0, "05ac294e9041bf6c", "232f0de01538893b", "b0b9e46315671c4c"),
        (
            "c",
            {"camera_motion": "orbit", "camera_travel": 3.0, "antialias": 3},
            *(7, 2, "5a84cbe6d5befde0", "7483d9f3a1567fed", "1a246fba5d9f672a"),
        ),
        (
            "a",
            {"camera_motion": "linear", "camera_travel": 2.0, "textured": True, "resolution": 32},
            *(5, 4, "4ad72f6a217b7d1d", "b2403b477f5408cb", "86fb6d4df4a6901b"),
        ),
        (
            "cluttered",
            {"frames": 24, "resolution": 16},
            *(0, 0, "ee370d7007d8043b", "09350f28ef96c79d", "cfcf9608c17d45fd"),
        ),
    ],
)
def test_videos_masks_and_facts(
    name: str, changes: dict[str, Any], seed: int, index: int, video: str, masks: str, facts: str
) -> None:
    arrays, found = render_scene(preset(name, **{**SMALL, **changes}), seed, index)
    content = [arrays["video"].tobytes(), arrays["segmentations"].tobytes(), json.dumps(found, sort_keys=True).encode()]
    assert [hashlib.sha256(part).hexdigest()[:16] for part in content] == [video, masks, facts]


def test_hashes_of_the_presets() -> None:
    # folders on users' disks are named after these
    assert {name: config.content_hash()[:12] for name, config in PRESETS.items()} == {
        "a": "e8306a3abe34",
        "a_zoom": "d66d2f701066",
        "c": "5a4e3383bf99",
        "e": "6267e204eba2",
        "cluttered": "eb56bd0b129c",
    }


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_look_as_they_always_did_on_any_machine(name: str) -> None:
    clip = render_video(preset(name, resolution=24, frames=3), seed=11, index=2)
    with np.load(GOLDEN, allow_pickle=False) as golden:
        masks, video = golden[f"{name}.segmentations"], golden[f"{name}.video"].astype(int)
    assert (clip["segmentations"] != masks).mean() < 0.005
    assert (np.abs(clip["video"] - video) > 2).mean() < 0.01
