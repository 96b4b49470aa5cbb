import os

import pytest

from ssync_pl.data.patterns import expand_braces, expand_shards
from ssync_pl.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    for name in ("a-000000.tar", "a-000001.tar", "a-000002.tar", "b-000000.tar", "c[1].tar"):
        (tmp_path / name).touch()
    (tmp_path / "d-000000.tar").symlink_to(tmp_path / "nothing")
    return tmp_path


A = [f"a-00000{number}.tar" for number in range(3)]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("{}/a-{{000000..000002}}.tar", A),
        ("{}/{{b,a}}-000000.tar", ["b-000000.tar", "a-000000.tar"]),
        ("{}/{{b,a}}-*.tar", ["b-000000.tar", *A]),
        ("~/b-*.tar", ["b-000000.tar"]),
        (["{}/b-000000.tar", "file://{}/a-000001.tar"], ["b-000000.tar", "a-000001.tar"]),
        ("{}/c[1].tar", ["c[1].tar"]),  # taken as it is
        ("https://nowhere.invalid/{{8..11}}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),  # not looked up
        ("https://nowhere.invalid/{{08..11}}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
    ],
)
def test_braces_globs_lists_and_plain_paths(folder, monkeypatch, patterns, names):
    monkeypatch.setenv("HOME", str(folder))
    filled = [pattern.format(folder) for pattern in patterns] if isinstance(patterns, list) else patterns.format(folder)
    assert [os.path.basename(shard) for shard in expand_shards(filled)] == names


@pytest.mark.parametrize(
    "pattern", ["{000000..}", "{3..1}", "a{b", "a}b", "{a{1..2}}", "{}", "{abc}", "{1..99999999}", "{0..9999}{0..9999}"]
)
def test_wrong_braces_name_argument_and_pattern(pattern):
    with pytest.raises(ConfigError, match="argument `validation` to hold braces") as error:
        expand_braces(pattern, "validation")
    assert pattern in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        *((f"{word} {{0..1}}.tar | cat", "shell command") for word in ("pipe:cat", "pipe: curl http://x/", "PIPE:ls")),
        *((pattern, "URLs of http") for pattern in ("s4://bucket/a.tar", "ssh://host/a.tar", "http:/host/a.tar")),
        ("https://host/a-*.tar", "by braces"),
        ("FOLDER/c-*.tar", "match at least one shard"),
        ("FOLDER", "folder"),
        ("FOLDER/[bd]-*.tar", "d-000000.tar.*link to nothing"),
        *((empty, "at least one shard") for empty in ([], "", [""])),
        (["FOLDER/a-*.tar", "FOLDER/a-000001.tar"], "comes twice"),
        (["FOLDER/a-*.tar", "https://host/a.tar"], "all local or all remote"),
        ("FOLDER/a-{000002..000003}.tar", r"a-000003\.tar.*from .*000002\.\.000003"),
    ],
)
def test_what_cannot_be_read_names_the_argument(folder, pattern, word):
    many = [item.replace("FOLDER", str(folder)) for item in pattern] if isinstance(pattern, list) else None
    with pytest.raises(ConfigError, match=f"argument `train` .*{word}"):
        expand_shards(pattern.replace("FOLDER", str(folder)) if many is None else many, "train")
