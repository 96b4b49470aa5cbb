from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssync_pl.errors import ConfigError
from ssync_pl.tools.doctor.load import build_model, load_weights, parse_batch, working_folder_first


def test_a_class_a_function_or_a_model(user_folder: Path) -> None:
    with working_folder_first():
        assert type(build_model("user_code:Net", {"slots": 5})).__name__ == "Net"
        assert isinstance(build_model("user_code:classifier"), nn.Sequential)
        assert build_model("user_code:model") is sys.modules["user_code"].model
    assert build_model("torch.nn:modules.Linear", {"in_features": 1, "out_features": 2}).out_features == 2
    assert str(user_folder) not in sys.path


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("user_code", {}, "'user_code' to be a model or to build one.*Write package.module:name"),
        (":Net", {}, "Write package.module:name"),
        ("./user_code.py:Net", {}, "Write package.module:name as `import` does"),
        ("nowhere:Net", {}, "No module named 'nowhere'.*in the folder of your code"),
        ("needy_code:Net", {}, "No module named 'a_module_that_is_not_there'"),
        ("broken_code:Net", {}, "RuntimeError: at import"),
        ("user_code:Nett", {}, "no attribute 'Nett'"),
        ("user_code:number", {}, "TypeError: 'int'"),
        ("user_code:fails", {"message": "bad"}, "with message='bad' .*ValueError: bad"),
        ("user_code:leaves", {}, "SystemExit: 3"),
        ("user_code:Net", {"slot": 3}, "TypeError: .*slot.*--init name=value"),
        ("user_code:model", {"slots": 3}, "TypeError"),
        ("builtins:dict", {}, "gives dict and no torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_built(user_folder: Path, target: str, settings: dict, message: str) -> None:
    with working_folder_first(), pytest.raises(ConfigError, match=message):
        build_model(target, settings)


@pytest.mark.parametrize(
    ("words", "shapes"),
    [
        (["2,4,3,8,8"], (2, 4, 3, 8, 8)),
        (["2,3", "4"], [(2, 3), (4,)]),
        (["img=1,2,3,8,8", "boxes=1,2,5,4"], {"img": (1, 2, 3, 8, 8), "boxes": (1, 2, 5, 4)}),
    ],
)
def test_batches(words: list[str], shapes: Any) -> None:
    found = parse_batch(words)
    if isinstance(shapes, dict):
        assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    else:
        assert (found.shape if len(words) == 1 else [tuple(one.shape) for one in found]) == shapes
    assert torch.equal(parse_batch(["4"]), parse_batch(["4"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(([word], "--batch as sizes") for word in ("a", "2,,3", "2,-1", "2,0", "=2,3", "2x3", "")),
        (["img=2,3", "4"], "one name per shape or without names"),
        (["a=2,3", "a=2"], "one name per shape"),
        (["100000000,2,3,224,224,1000"], "to fit into memory"),
        (["99999999999999999999999,2"], "to fit into memory"),
    ],
)
def test_shapes_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_batch(words)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, ("never",)


def test_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(layer.state_dict(), "plain.pt")
    load_weights(other, Path("plain.pt"))
    assert torch.equal(layer.weight, other.weight)
    torch.save({"state_dict": {}, "more": _Bomb()}, "bomb.pt")
    for name, message in (("nothing", "no such file"), ("bomb", "plain values only")):
        with pytest.raises(ConfigError, match=message):
            load_weights(other, Path(f"{name}.pt"))
    with pytest.raises(ConfigError, match=r"weights of Linear.*size mismatch"):
        load_weights(nn.Linear(2, 3), Path("plain.pt"))
    assert not Path("never").exists()
