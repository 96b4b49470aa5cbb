from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from ssync_pl.cli import with_config
from ssync_pl.cli.trainer import add_predict_options
from ssync_pl.errors import ConfigError


def test_other_verbs_and_calls_that_need_no_configuration_are_left_alone() -> None:
    for words in (["fit", "--ckpt_path", "a"], ["predict", "--model=SAVi", "--x=1"], ["validate", "-h"], ["--help"]):
        assert with_config(words) == words


def test_inputs_come_several_times_and_stay_whole() -> None:
    parser = LightningArgumentParser()
    add_predict_options(parser)
    options = parser.parse_args(["--input", "a.mp4", 'b,"c".mp4', "--clip-frames", "8", "--input=null"])
    assert (options.input, options.clip_frames) == (["a.mp4", 'b,"c".mp4', "null"], 8)


@pytest.mark.parametrize("verb", ["predict", "validate"])
@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_the_configuration_beside_the_run(tmp_path: Path, verb: str, below: str, capsys: Any) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    (tmp_path / "config.yaml").write_text("a: 1")
    found, checkpoint = f"--config={tmp_path / 'config.yaml'}", str(tmp_path / below / "last.ckpt")
    for way in ([f"--ckpt_path={checkpoint}"], ["--ckpt_path", checkpoint]):
        words = [verb, *way, "--input", "a"]
        assert with_config(words) == [verb, found, *words[1:]]
        assert f"configuration: {tmp_path / 'config.yaml'}" in capsys.readouterr().err
        assert with_config([*words, found]) == [*words, found]


def test_what_to_pass_is_said(tmp_path: Path) -> None:
    for words in ([], [f"--ckpt_path={tmp_path / 'a.ckpt'}"]):
        with pytest.raises(ConfigError, match=r"--config FILE, or --ckpt_path .*config\.yaml"):
            with_config(["predict", "--input=a", *words])
