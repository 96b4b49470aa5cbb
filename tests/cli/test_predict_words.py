from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from ssync_pl.cli.predict import add_input_options, with_config
from ssync_pl.errors import ConfigError


def test_other_verbs_and_calls_without_input_are_left_alone() -> None:
    for words in (
        ["fit", "--input", "a"],
        ["predict", "--config", "a.yaml", "--x=1"],
        ["predict", "--input", "-h"],
        [],
    ):
        assert with_config(words) == words


def test_inputs_come_several_times_and_stay_whole() -> None:
    parser = LightningArgumentParser()
    add_input_options(parser)
    options = parser.parse_args(["--input", "a.mp4", 'b,"c".mp4', "--clip-frames", "8", "--input=null"])
    assert (options.input, options.clip_frames) == (["a.mp4", 'b,"c".mp4', "null"], 8)


@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_the_configuration_beside_the_run(tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    (tmp_path / "config.yaml").write_text("")
    checkpoint = tmp_path / below / "last.ckpt"
    checkpoint.write_text("")
    for way in ([f"--ckpt_path={checkpoint}"], ["--ckpt_path", str(checkpoint)]):
        words = ["predict", *way, "--input", "a"]
        assert with_config(words) == ["predict", f"--config={tmp_path / 'config.yaml'}", *words[1:]]
        assert f"configuration: {tmp_path / 'config.yaml'}" in capsys.readouterr().err
        assert with_config([*words, "--config", "mine.yaml"]) == [*words, "--config", "mine.yaml"]


def test_what_to_pass_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("")
    for words, message in (
        ([], "--ckpt_path beside --input.*--config FILE"),
        ([f"--ckpt_path={tmp_path / 'a.ckpt'}"], "config.yaml in .* --config FILE"),
        (["--config=a.yaml", f"--ckpt_path={tmp_path / 'gone.ckpt'}"], r"gone\.ckpt, which does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_config(["predict", "--input=a", *words])
