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
    spelled: Any = {"object_sizes": [1, 1.6], "zoom": 2, "fps": 12}
    assert SceneConfig(**spelled).content_hash() == SceneConfig(object_sizes=(1.0, 1.6), zoom=2.0).content_hash()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SceneConfig)])
def test_hash_depends_on_every_field(field: str) -> None:
    other: dict[str, Any] = {
        "name": "b", "resolution": 64, "frames": 3, "fps": 6.0, "min_objects": 2, "max_objects": 4,
        "object_sizes": (1.0,), "zoom": 2.0, "antialias": 1, "textured": True, "camera_motion": "linear",
        "camera_travel": 2.0, "spawn_extent": 2.0, "spawn_height": (1.0, 2.0), "max_speed": 1.0,
    }  # fmt: skip
    base = SceneConfig(camera_motion="orbit", camera_travel=1.0)
    assert dataclasses.replace(base, **{field: other[field]}).content_hash() != base.content_hash()


def test_settings_survive_json() -> None:
    for config in PRESETS.values():
        assert SceneConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"resolution": 4}, "`resolution` to be a whole number from 8 to 1024, but got 4"),
        ({"resolution": 64.0}, "`resolution` to be a whole number"),
        ({"frames": 0}, "`frames`"),
        ({"antialias": 9}, "`antialias`"),
        ({"min_objects": 5, "max_objects": 4}, "at most `max_objects`, but got 5 > 4"),
        ({"max_objects": 65}, "`max_objects`"),
        ({"zoom": 0.0}, "`zoom` to be from 0.5 to 10"),
        ({"zoom": float("nan")}, "`zoom`"),
        ({"zoom": "wide"}, "`zoom` to be a number, but got 'wide'"),
        ({"object_sizes": ()}, "at least one size"),
        ({"object_sizes": 1.0}, "`object_sizes` to be a list of numbers"),
        ({"object_sizes": (9.0,)}, "`object_sizes` to be from"),
        ({"spawn_height": (3.0, 1.0)}, "`spawn_height`"),
        ({"name": "../a"}, "`name` to be ASCII letters"),
        ({"textured": "yes"}, "`textured`"),
        ({"camera_motion": "fly"}, "one of .*'orbit'.*but got 'fly'"),
        ({"camera_motion": "orbit"}, "`camera_travel`"),
        ({"camera_travel": 1.0}, "`camera_travel`"),
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
