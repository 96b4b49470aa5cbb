from __future__ import annotations

import sys
from pathlib import Path

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
        ("user_code", {}, "model as 'package.module:name', but got 'user_code'"),
        (":Net", {}, "model as 'package.module:name'"),
        ("nowhere:Net", {}, "module 'nowhere' for 'nowhere:Net', but there is none. Run this in the folder"),
        ("torch.nowhere:Net", {}, "module 'torch.nowhere' for"),
        ("needy_code:Net", {}, "needs 'a_module_that_is_not_there', which is not installed"),
        ("broken_code:Net", {}, "import 'broken_code', but it raised RuntimeError: at import"),
        ("user_code:Nett", {}, "'Nett' in 'user_code'.*Its names: .*Net"),
        ("user_code:number", {}, "'user_code:number' to be .*, but got int"),
        (
            "user_code:fails",
            {"message": "bad"},
            r"from message='bad', but it raised ValueError: bad. Give",
        ),
        ("user_code:Net", {"slot": 3}, "raised TypeError: .*slot"),
        ("user_code:model", {"slots": 3}, "no --init for 'user_code:model', which is a model already"),
        ("builtins:dict", {}, "torch.nn.Module, .* but got dict"),
    ],
)
def test_models_that_cannot_be_built(user_folder: Path, target: str, settings: dict, message: str) -> None:
    with working_folder_first(), pytest.raises(ConfigError, match=message):
        build_model(target, settings)


def test_batches() -> None:
    assert parse_batch(["2,4,3,8,8"]).shape == (2, 4, 3, 8, 8)
    assert parse_batch(["2,8"]).shape == (2, 8)
    named = parse_batch(["img=1,2,3,8,8", "boxes=1,2,5,4"])
    assert {name: tuple(value.shape) for name, value in named.items()} == {
        "img": (1, 2, 3, 8, 8),
        "boxes": (1, 2, 5, 4),
    }
    first, second = parse_batch(["2,3", "4"])
    assert (first.shape, second.shape) == ((2, 3), (4,))
    assert torch.equal(parse_batch(["4"]), parse_batch(["4"]))


SIZES = "--batch as sizes"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(([word], SIZES) for word in ("a", "2,,3", "2,-1", "2,0", "=2,3", "2x3", "")),
        (["img=2,3", "4"], "names for all shapes of --batch or for none"),
        (["a=2,3", "a=2"], "each name of --batch once, but got 'a' again"),
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
    Path("text.pt").write_text("nothing")
    torch.save({"state_dict": {}, "more": _Bomb()}, "bomb.pt")
    for name, message in (("nothing", "no such file"), ("text", "plain values only"), ("bomb", "plain values only")):
        with pytest.raises(ConfigError, match=message) as caught:
            load_weights(other, Path(f"{name}.pt"))
        assert "weights_only" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"weights of Linear.*size mismatch"):
        load_weights(nn.Linear(2, 3), Path("plain.pt"))
    assert not Path("never").exists()


def test_scripts_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script_code.py").write_text("import argparse; argparse.ArgumentParser().parse_args(['--no'])")
    (tmp_path / "leaving_code.py").write_text("def build(): raise SystemExit(3)")
    with working_folder_first():
        with pytest.raises(ConfigError, match=r"ended the program .*__main__"):
            build_model("script_code:Net")
        with pytest.raises(ConfigError, match="raised SystemExit: 3"):
            build_model("leaving_code:build")
        with pytest.raises(ConfigError, match=r"as `import` names it, .* Write e\.g\. 'folder\.script_code'"):
            build_model("./folder/script_code.py:Net")
