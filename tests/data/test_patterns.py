from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssync_pl.data.patterns import expand_braces, expand_shards
from ssync_pl.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    for name in ("a-000000.tar", "a-000001.tar", "a-000002.tar", "b-000000.tar"):
        (tmp_path / name).touch()
    return tmp_path


def _names(shards: list[str]) -> list[str]:
    return [os.path.basename(shard) for shard in shards]


def test_braces_globs_lists_and_plain_paths(folder):
    assert _names(expand_shards(f"{folder}/a-{{000000..000002}}.tar")) == [f"a-00000{i}.tar" for i in range(3)]
    assert _names(expand_shards(f"{folder}/{{b,a}}-000000.tar")) == ["b-000000.tar", "a-000000.tar"]
    assert _names(expand_shards(f"{folder}/a-*.tar")) == [f"a-00000{i}.tar" for i in range(3)]
    assert _names(expand_shards(f"{folder}/{{b,a}}-*.tar")) == ["b-000000.tar", *(f"a-00000{i}.tar" for i in range(3))]
    assert expand_shards([f"{folder}/b-000000.tar", f"file://{folder}/a-000001.tar"]) == [
        f"{folder}/b-000000.tar",
        f"{folder}/a-000001.tar",
    ]


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert _names(expand_shards("~/b-*.tar")) == ["b-000000.tar"]


def test_padding_follows_the_numbers():
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    assert expand_braces("{08..11}") == ["08", "09", "10", "11"]
    assert len(expand_braces("movi_c-train-{000000..000304}.tar")) == 305


@pytest.mark.parametrize(
    "pattern", ["{000000..}", "{3..1}", "a{b", "a}b", "{a{1..2}}", "{}", "{abc}", "{1..99999999}", "{0..9999}{0..9999}"]
)
def test_wrong_braces_name_argument_and_pattern(pattern):
    with pytest.raises(ConfigError, match="argument `validation` to hold braces") as error:
        expand_braces(pattern, "validation")
    assert pattern in str(error.value)


@pytest.mark.parametrize("pattern", ["pipe:cat a.tar", "pipe: curl http://x/{0..1}.tar | cat", "PIPE:ls"])
def test_pipes_are_refused(pattern):
    with pytest.raises(ConfigError, match=r"argument `train` .* shell command 'p?P?"):
        expand_shards(pattern, "train")


@pytest.mark.parametrize("pattern", ["s4://bucket/a.tar", "ssh://host/a.tar", "http:/host/a.tar"])
def test_unreadable_schemes_are_refused(pattern):
    with pytest.raises(ConfigError, match=f"argument `train` .*{pattern}"):
        expand_shards(pattern, "train")


def test_missing_paths_empty_sets_and_folders(folder):
    with pytest.raises(FileNotFoundError, match=r"argument `train` .*a-000003\.tar.*from .*000002\.\.000003"):
        expand_shards(f"{folder}/a-{{000002..000003}}.tar", "train")
    with pytest.raises(ConfigError, match=r"argument `train` to match at least one shard, but .*c-\*\.tar"):
        expand_shards(f"{folder}/c-*.tar", "train")
    with pytest.raises(ConfigError, match=r"argument `train` .* is a folder"):
        expand_shards(str(folder), "train")
    for empty in ([], "", [""]):
        with pytest.raises(ConfigError, match="argument `train` to name at least one shard"):
            expand_shards(empty, "train")


def test_doubles_and_mixtures_are_refused(folder):
    with pytest.raises(ConfigError, match="comes twice"):
        expand_shards([f"{folder}/a-*.tar", f"{folder}/a-000001.tar"])
    with pytest.raises(ConfigError, match="all local or all remote"):
        expand_shards([f"{folder}/a-*.tar", "https://host/a.tar"])


def test_remote_shards_are_not_looked_up():
    assert expand_shards("https://nowhere.invalid/a-{0..1}.tar") == [
        "https://nowhere.invalid/a-0.tar",
        "https://nowhere.invalid/a-1.tar",
    ]
    with pytest.raises(ConfigError, match="by braces"):
        expand_shards("https://host/a-*.tar", "train")


def test_file_names_with_glob_characters_are_taken_as_they_are(tmp_path):
    Path(tmp_path, "a[1].tar").touch()
    assert _names(expand_shards(f"{tmp_path}/a[1].tar")) == ["a[1].tar"]
