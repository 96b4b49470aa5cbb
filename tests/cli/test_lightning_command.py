import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from ssync_pl import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `lightning WORDS...` with lightning-sdk or without; `main` of ssync-pl only says its words."""
    monkeypatch.setattr(cli, "main", lambda words: sys.stdout.write(f"ours {words}") and 5)

    def call(words, sdk):
        def find(group, name):
            assert (group, name) == ("console_scripts", "lightning")
            ours = SimpleNamespace(dist=SimpleNamespace(name="ssync-pl"), load=None)
            theirs = SimpleNamespace(dist=SimpleNamespace(name="lightning_sdk"), load=lambda: lambda: 7)
            return [ours, theirs] if sdk else [ours]

        monkeypatch.setattr(metadata, "entry_points", find)
        monkeypatch.setattr(sys, "argv", ["lightning", *words])
        return cli.lightning(), capsys.readouterr()

    return call


@pytest.mark.parametrize("words", [["login", "--now"], ["--help"], [], ["run", "fit"]])
def test_the_sdk_gets_its_words_and_keeps_its_exit_status(run, words):
    assert run(words, sdk=True)[0] == 7
    assert sys.argv == ["lightning", *words]


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_training_verbs_are_ours_even_with_the_sdk(run, verb):
    status, streams = run([verb, "--config", "x.yaml"], sdk=True)
    assert (status, streams.out) == (5, f"ours ['{verb}', '--config', 'x.yaml']")


def test_without_the_sdk_other_commands_say_what_is_missing(run):
    status, streams = run(["login"], sdk=False)
    assert (status, streams.out) == (2, "")
    assert "pip install lightning-sdk" in streams.err
    for words in (["--help"], ["-h"], []):
        status, streams = run(words, sdk=False)
        assert status == 0
        assert "fit,validate,test,predict" in streams.out
