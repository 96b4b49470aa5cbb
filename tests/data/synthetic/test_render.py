"""What rendered videos promise besides their pinned bytes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from ssync_pl.data.synthetic import PRESETS, SceneConfig, preset, render_scene, render_video, sample_scene
from ssync_pl.errors import ConfigError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_shapes_types_ids_and_number_of_objects(name: str) -> None:
    config = preset(name, resolution=16, frames=2)
    for index in range(3):
        arrays, facts = render_scene(config, 1, index)
        assert arrays["video"].shape == (2, 16, 16, 3)
        assert arrays["segmentations"].shape == (2, 16, 16, 1)
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.uint8)}
        assert config.min_objects <= len(facts["instances"]) <= config.max_objects
        assert [item["id"] for item in facts["instances"]] == list(range(1, len(facts["instances"]) + 1))
        counts = [int((arrays["segmentations"] == item["id"]).sum()) for item in facts["instances"]]
        assert counts == sorted(counts, reverse=True)  # ids follow visibility
        assert counts == [sum(item["visible_pixels"]) for item in facts["instances"]]


def test_equal_arguments_give_equal_videos_in_any_order() -> None:
    config = SceneConfig(resolution=16, frames=2)
    forward = [render_video(config, 3, index)["video"] for index in range(3)]
    backward = [render_video(config, 3, index)["video"] for index in (2, 1, 0)][::-1]
    assert all((one == other).all() for one, other in zip(forward, backward, strict=True))
    assert (forward[0] != forward[1]).any()
    assert (forward[0] != render_video(config, 4, 0)["video"]).any()


def test_looks_and_zoom_do_not_change_the_motion() -> None:
    plain = sample_scene(SceneConfig(frames=3), 0, 1).path
    for changes in ({"zoom": 2.0}, {"textured": True}):
        changed: Any = changes
        assert (sample_scene(SceneConfig(frames=3, **changed), 0, 1).path.position == plain.position).all()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_always_fit(name: str) -> None:
    for index in range(30):
        sample_scene(preset(name, frames=1), 0, index)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        # passes the bound of the densest packing, yet random places cannot reach it
        ({"min_objects": 21, "resting_extent": 3.2, "object_sizes": (1.6,)}, "resting_extent"),
        ({"spawn_extent": 0.1, "spawn_height": (0.0, 0.0), "thrown": (3, 3)}, "spawn_extent"),
    ],
)
def test_what_does_not_fit_is_refused_quickly(changes: dict[str, Any], match: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match=match):
        sample_scene(preset("e", **changes), 0, 0)
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (True, 0), (0, 1.5)])
def test_bad_seed_or_index_is_refused(seed: Any, index: Any) -> None:
    with pytest.raises(ConfigError, match="0 or more"):
        render_video(SceneConfig(resolution=16, frames=1), seed, index)
