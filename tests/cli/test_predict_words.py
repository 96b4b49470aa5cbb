from pathlib import Path

import pytest

from ssync_pl.cli.predict_words import find_config, gather_inputs, with_config
from ssync_pl.errors import ConfigError


def test_other_verbs_and_calls_without_input_are_left_alone() -> None:
    for words in (["fit", "--input", "a"], ["predict", "--config", "a.yaml", "--x=1"], []):
        assert gather_inputs(words) == words
        assert with_config(words) == words


def test_inputs_with_commas_and_quotes_stay_whole() -> None:
    assert gather_inputs(["predict", "--input", 'a,"b".mp4'])[-1] == '--input=["a,\\"b\\".mp4"]'


@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_the_configuration_beside_the_run(tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    (tmp_path / "config.yaml").write_text("")
    checkpoint = tmp_path / below / "last.ckpt"
    checkpoint.write_text("")
    words = ["predict", f"--ckpt_path={checkpoint}", '--input=["a"]']
    assert with_config(words) == ["predict", f"--config={tmp_path / 'config.yaml'}", *words[1:]]
    assert f"configuration: {tmp_path / 'config.yaml'}" in capsys.readouterr().err
    named = [*words, "--config", "mine.yaml"]
    assert with_config(named) == named


def test_what_to_pass_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ckpt_path beside --input, or --config FILE"):
        with_config(["predict", "--input=[]"])
    (tmp_path / "a.ckpt").write_text("")
    with pytest.raises(ConfigError, match=r"there is none\. Pass the configuration .* --config FILE"):
        find_config(str(tmp_path / "a.ckpt"))
    with pytest.raises(ConfigError, match=r"gone\.ckpt does not exist"):
        with_config(["predict", "--config=a.yaml", "--input=[]", f"--ckpt_path={tmp_path / 'gone.ckpt'}"])
