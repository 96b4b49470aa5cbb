from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from ssync_pl.data.synthetic import PRESETS, SceneConfig, preset
from ssync_pl.errors import ConfigError


def test_hash_is_the_same_in_another_process() -> None:
    code = "from ssync_pl.data.synthetic import preset; print(preset('c', resolution=64).content_hash())"
    environment = {"PYTHONHASHSEED": "7", "PATH": ""}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == preset("c", resolution=64).content_hash()


def test_hash_ignores_the_spelling_of_equal_values() -> None:
    lists: Any = {"thrown": [1, 3], "camera_shell": [7, 9], "camera_elevation": [20, 65]}
    assert preset("e", **lists) == PRESETS["e"]
    spelled: Any = {"object_sizes": [1, 1.6], "zoom": 2, "fps": 12}
    assert SceneConfig(**spelled).content_hash() == SceneConfig(object_sizes=(1.0, 1.6), zoom=2.0).content_hash()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SceneConfig)])
def test_hash_depends_on_every_field(field: str) -> None:
    other: dict[str, Any] = {
        "name": "b", "resolution": 64, "frames": 3, "fps": 6.0, "min_objects": 2, "max_objects": 4,
        "object_sizes": (1.0,), "zoom": 2.0, "antialias": 1, "textured": True, "camera_motion": "linear",
        "camera_travel": 2.0, "spawn_extent": 2.0, "spawn_height": (1.0, 2.0), "max_speed": 1.0,
        "thrown": (1, 1), "resting_extent": 4.0, "clumping": 0.5, "camouflage": 0.5, "distractors": 2,
        "camera_shell": (6.0, 9.0), "camera_elevation": (30.0, 40.0),
    }  # fmt: skip
    textured = field in ("camouflage", "distractors")
    base = SceneConfig(
        camera_motion="orbit", camera_travel=1.0, thrown=(1, 2), camera_shell=(7.0, 9.0), textured=textured
    )
    assert dataclasses.replace(base, **{field: other[field]}).content_hash() != base.content_hash()


def test_hash_of_older_settings_stays() -> None:
    # folders on users' disks are named after these
    assert SceneConfig().content_hash().startswith("e8306a3abe34")
    assert preset("a_zoom").content_hash().startswith("d66d2f701066")
    assert preset("c").content_hash().startswith("5a4e3383bf99")
    assert "thrown" not in SceneConfig().to_dict()
    assert preset("e").to_dict()["thrown"] == [1, 3]


def test_settings_survive_json() -> None:
    for config in PRESETS.values():
        assert SceneConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"resolution": 4}, "resolution"),
        ({"resolution": 64.0}, "resolution"),
        ({"frames": 0}, "frames"),
        ({"antialias": 9}, "antialias"),
        ({"min_objects": 5, "max_objects": 4}, "max_objects"),
        ({"max_objects": 65}, "max_objects"),
        ({"zoom": 0.0}, "zoom"),
        ({"zoom": float("nan")}, "zoom"),
        ({"zoom": "wide"}, "zoom"),
        ({"object_sizes": ()}, "at least one size"),
        ({"object_sizes": 1.0}, "object_sizes"),
        ({"object_sizes": (9.0,)}, "object_sizes"),
        ({"spawn_height": (3.0, 1.0)}, "spawn_height"),
        ({"name": "../a"}, "name"),
        ({"textured": "yes"}, "textured"),
        ({"camera_motion": "fly"}, "fly"),
        ({"camera_motion": "orbit"}, "camera_travel"),
        ({"camera_travel": 1.0}, "camera_travel"),
        ({"thrown": 2}, "thrown"),
        ({"thrown": (1, 2, 3)}, "thrown"),
        ({"thrown": (1, 2.5)}, "thrown"),
        ({"thrown": (3, 1)}, "thrown"),
        ({"thrown": (4, 5)}, "max_objects"),
        ({"thrown": (0, 8)}, "thrown"),
        ({"thrown": (1, 1), "resting_extent": 0.0}, "resting_extent"),
        ({"thrown": (1, 1), "clumping": 1.5}, "clumping"),
        ({"thrown": (0, 0), "min_objects": 9, "resting_extent": 0.5}, "Expected 9 objects.*floor there is too small"),
        ({"clumping": 0.5}, "clumping"),
        ({"resting_extent": 3.0}, "thrown"),
        ({"camouflage": 0.5}, "textured"),
        ({"distractors": 3}, "textured"),
        ({"textured": True, "camouflage": 2.0}, "camouflage"),
        ({"textured": True, "distractors": 65}, "distractors"),
        ({"camera_shell": 7.0}, "camera_shell"),
        ({"camera_shell": (7.0,)}, "camera_shell"),
        ({"camera_shell": (9.0, 7.0)}, "camera_shell"),
        ({"camera_shell": (7.0, 20.0)}, "camera_shell"),
        ({"camera_elevation": (30.0, 40.0)}, "camera_shell"),
        ({"camera_shell": (7.0, 9.0), "camera_elevation": (0.0, 40.0)}, "camera_elevation"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SceneConfig(**change)


def test_unknown_preset_or_field_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'a', 'a_zoom', 'c'.*but got 'z'"):
        preset("z")
    with pytest.raises(ConfigError, match=r"resolution.*but got \['size'\]"):
        preset("a", size=3)
    assert preset("a", name="mine").name == "mine"
