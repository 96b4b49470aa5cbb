from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ssync_pl.errors import ConfigError
from ssync_pl.tools.doctor.load import build_model, load_weights, parse_batch, parse_settings, working_folder_first


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
        ("user_code:number", {}, "'user_code:number' to be a class, a function or a model, but got int"),
        (
            "user_code:fails",
            {"message": "bad"},
            r"from message='bad', but it raised ValueError: bad. Give",
        ),
        ("user_code:Net", {"slot": 3}, "raised TypeError: .*slot"),
        ("user_code:model", {"slots": 3}, "no --init for 'user_code:model', which is a model already"),
        ("builtins:dict", {}, "to give a torch.nn.Module, but got dict"),
    ],
)
def test_models_that_cannot_be_built(user_folder: Path, target: str, settings: dict, message: str) -> None:
    with working_folder_first(), pytest.raises(ConfigError, match=message):
        build_model(target, settings)


def test_batches() -> None:
    assert parse_batch(["2,4,3,8,8"], as_dict=False).shape == (2, 4, 3, 8, 8)
    assert parse_batch(["2,3,8,8"], as_dict=True)["image"].shape == (2, 3, 8, 8)
    assert parse_batch(["2,8"], as_dict=True).shape == (2, 8)
    named = parse_batch(["img=1,2,3,8,8", "boxes=1,2,5,4"], as_dict=False)
    assert {name: tuple(value.shape) for name, value in named.items()} == {
        "img": (1, 2, 3, 8, 8),
        "boxes": (1, 2, 5, 4),
    }
    first, second = parse_batch(["2,3", "4"], as_dict=True)
    assert (first.shape, second.shape) == ((2, 3), (4,))
    assert torch.equal(parse_batch(["4"], as_dict=False), parse_batch(["4"], as_dict=False))


@pytest.mark.parametrize("word", ["a", "2,,3", "2,-1", "2,0", "=2,3", "2x3", ""])
def test_shapes_that_are_none(word: str) -> None:
    with pytest.raises(ConfigError, match=r"--batch as sizes, e.g. 2,4,3,64,64"):
        parse_batch([word], as_dict=False)


def test_names_for_all_or_for_none() -> None:
    with pytest.raises(ConfigError, match="names for all shapes of --batch or for none"):
        parse_batch(["img=2,3", "4"], as_dict=False)


@pytest.mark.parametrize(
    ("word", "message"), [("slots", "name=value, but got 'slots'"), ("a=[1", "of --init a to be YAML")]
)
def test_settings_that_are_none(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings([word])


def test_weights(tmp_path: Path) -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(layer.state_dict(), tmp_path / "plain.pt")
    load_weights(other, tmp_path / "plain.pt")
    assert torch.equal(layer.weight, other.weight)
    with pytest.raises(ConfigError, match=r"checkpoint at .*, but there is none"):
        load_weights(other, tmp_path / "nothing.pt")
    with pytest.raises(ConfigError, match=r"weights of Linear, but RuntimeError.*size mismatch"):
        load_weights(nn.Linear(2, 3), tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(ConfigError, match=r"text.pt to hold tensors and plain values only"):
        load_weights(other, tmp_path / "text.pt")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, ("never",)


def test_weights_that_would_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "more": _Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ConfigError, match="tensors and plain values only") as caught:
        load_weights(nn.Linear(2, 2), tmp_path / "bomb.pt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("word", ["100000000,2,3,224,224,1000", "99999999999999999999999,2"])
def test_a_batch_that_does_not_fit(word: str) -> None:
    with pytest.raises(ConfigError, match="to fit into memory"):
        parse_batch([word], as_dict=False)


def test_a_name_of_a_batch_comes_once() -> None:
    with pytest.raises(ConfigError, match="each name of --batch once, but got 'a' again"):
        parse_batch(["a=2,3", "a=2"], as_dict=False)


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
