import dataclasses
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import pytest
import yaml

from ssync_pl.data.synthetic import PRESETS, SceneConfig, preset, render_video
from ssync_pl.data.synthetic.scene import sample_scene
from ssync_pl.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "examples" / "slotcontrast_synthetic.yaml"
FROM_ABOVE = yaml.safe_load(EXAMPLE.read_text("utf-8"))["data"]["init_args"]["scene"]


# sines and roots may differ by a bit between kinds of machines
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other roots")
@pytest.mark.parametrize(
    ("name", "changes", "seed", "index", "video", "masks"),
    [
        ("a", {}, 3, 1, "0e859d6d6fea6189", "075b12dd9746bfac"),
        ("a_zoom", {}, 3, 1, "54a11a4af196e40a", "ad718732711a356e"),
        ("c", {}, 3, 1, "1063d4c4617b0779", "075b12dd9746bfac"),  # textures change no mask
        ("c", FROM_ABOVE, 3, 1, "a18472fb7c0e5d7d", "e1bd2e40637aa75e"),
        ("a", {"antialias": 1}, 0, 0, "05ac294e9041bf6c", "232f0de01538893b"),
    ],
)
def test_bytes_of_videos_and_masks(name, changes, seed, index, video, masks):
    arrays = render_video(preset(name, **{"resolution": 24, "frames": 5, **changes}), seed, index)
    found = [hashlib.sha256(arrays[key].tobytes()).hexdigest()[:16] for key in ("video", "segmentations")]
    assert found == [video, masks]


def test_arrays_ids_and_independence_of_what_ran_before():
    config = SceneConfig(resolution=16, frames=2)
    forward = [render_video(config, 3, index) for index in range(3)]
    backward = [render_video(config, 3, index) for index in (2, 1, 0)][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert all((one[key] == other[key]).all() for key in one)
        assert (one["video"].shape, one["segmentations"].shape) == ((2, 16, 16, 3), (2, 16, 16, 1))
        assert {array.dtype for array in one.values()} == {np.dtype(np.uint8)}
        visible = np.bincount(one["segmentations"].ravel())[1:].tolist()
        assert visible == sorted(visible, reverse=True)  # ids follow visibility
    assert (forward[0]["video"] != forward[1]["video"]).any()
    assert (forward[0]["video"] != render_video(config, 4, 0)["video"]).any()


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in sorted(PRESETS)), ("c", FROM_ABOVE)])
def test_presets_always_fit_and_zoom_changes_no_motion(name, changes):
    config = preset(name, frames=1, **changes)
    for index in range(30):
        scene = sample_scene(config, 0, index)
        assert config.min_objects <= len(scene.frames[0]) <= config.max_objects
        near = sample_scene(dataclasses.replace(config, zoom=3.0), 0, index)
        pairs = zip(scene.frames[0], near.frames[0], strict=True)
        assert all((one.centre == other.centre).all() for one, other in pairs)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (True, 0), (0, 1.5)])
def test_bad_seed_or_index_is_refused(seed, index):
    with pytest.raises(ConfigError, match="whole number"):
        render_video(SceneConfig(resolution=16, frames=1), seed, index)


def test_settings_have_one_spelling_and_survive_json():
    assert SceneConfig(object_sizes=[1, 1.6], zoom=2, fps=12) == SceneConfig(object_sizes=(1.0, 1.6), zoom=2.0)
    for config in (*PRESETS.values(), preset("c", **FROM_ABOVE)):
        assert SceneConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"resolution": 64.0}, "resolution"),
        ({"min_objects": 5, "max_objects": 4}, "max_objects"),
        ({"zoom": float("nan")}, "zoom"),
        ({"object_sizes": ()}, "object_sizes"),
        ({"object_sizes": 1.0}, "object_sizes"),
        ({"spawn_height": (3.0, 1.0)}, "spawn_height"),
        ({"name": "../a"}, "name"),
        ({"textured": "yes"}, "textured"),
        ({"camera_shell": (7.0,)}, "camera_shell"),
        ({"camera_elevation": (30.0, 40.0)}, "camera_shell"),
    ],
)
def test_bad_settings_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        SceneConfig(**change)
