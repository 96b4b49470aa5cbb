from __future__ import annotations

import pytest
from public_configs import TEXTS

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.interpolation import parse_yaml, read_config, resolve
from ssync_pl.tools.official.vits import timm_name, vit_property


def test_references_go_to_the_root_to_neighbours_and_through_each_other():
    tree = {
        "a": {"b": 3, "same": "${.b}", "up": "${..c}", "deep": {"far": "${...c}"}},
        "c": "${a.b}",
        "whole": "${a.deep}",
        "list": [1, "${a.b}"],
        "item": "${list[1]}",
        "other": "${list.0}",
        "text": "run-${a.b}-${c}",
        "none": None,
        "spaced": "${ a.b }",
    }
    assert resolve(tree) == {
        "a": {"b": 3, "same": 3, "up": 3, "deep": {"far": 3}},
        "c": 3,
        "whole": {"far": 3},
        "list": [1, 3],
        "item": 3,
        "other": 1,
        "text": "run-3-3",
        "none": None,
        "spaced": 3,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${add: 1, 2, 3}", 6),
        ("${sub: 1, 2.5}", -1.5),
        ("${mul: ${n}, 2, 3}", 24),
        ("${div: 1, ${n}}", 0.25),
        ("${min: 3, 1, 2}", 1),
        ("${max:3,${mul:${n},2}}", 8),
        ("${eval: 'a / 32 * b', 128, 1e-4}", 0.0004),
        ('${eval: "x, y: x - y", 5, ${n}}', 1),
        ("${eval: 'lambda x: x ** 2', ${n}}", 16),
        ("${config_prop: VIT_PARAMS, ${vit}, NUM_PATCHES}", 784),
        ("${config_prop:VIT_PARAMS,vit_small_patch14_dinov2,FEAT_DIM}", 384),
    ],
)
def test_functions(text, value):
    found = resolve({"n": 4, "vit": "vit_base_patch8_224_dino", "x": {"y": text}})["x"]["y"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": "${b}", "b": "${a}"}, "refers to itself"),
        ({"a": {"b": "${a}"}}, "refers to itself"),
        ({"a": "${nowhere.b}"}, "Expected a value at nowhere.b"),
        ({"a": [1], "b": "${a.1}"}, "Expected a value at a.1"),
        ({"a": "${oc.env:HOME}"}, "Expected one of the functions"),
        ({"a": "${eval: '__import__(1)'}"}, "but got a call"),
        ({"a": "${eval: 'a + b', 1}"}, "the unknown name 'b'"),
        ({"a": "${eval: 'x: x', 1, 2}"}, "to take numbers"),
        ({"a": "${add: 1, two}"}, "to take numbers"),
        ({"a": "${mul: 1e18, 1e18}"}, "numbers of at most"),
        ({"a": "${div: 1, 0}"}, "to take numbers"),
        ({"a": "${sub: 1}"}, "to take numbers"),
        ({"a": "${add: 1"}, "Expected a reference such as"),
        ({"a": "${}"}, "Expected a reference such as"),
        ({"a": "${add: [1, 2]}"}, "Expected a reference such as"),
        ({"a": "${${b}}", "b": "c"}, "Expected a reference such as"),
        ({"a": "x${b}", "b": [1]}, "Expected single values"),
        ({"a": "${config_prop: PATH, b, c}"}, "FEAT_DIM or NUM_PATCHES"),
        ({"a": "${config_prop: VIT_PARAMS, resnet50, FEAT_DIM}"}, "a vision transformer"),
    ],
)
def test_bad_references_say_where_and_what(tree, message):
    with pytest.raises(ConfigError, match=message):
        resolve(tree)


def test_numbers_are_numbers_and_keys_come_once():
    assert parse_yaml("{a: 1e-4, b: 3E2, c: 1.5e-8, d: .5, e: 1e, f: '1e-4', g: 12}") == {
        "a": 1e-4,
        "b": 300.0,
        "c": 1.5e-8,
        "d": 0.5,
        "e": "1e",
        "f": "1e-4",
        "g": 12,
    }
    with pytest.raises(ConfigError, match="the key 'a' comes twice"):
        parse_yaml("a: 1\na: 2")
    with pytest.raises(ConfigError, match="to be YAML"):
        parse_yaml("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="a YAML mapping, but got list"):
        parse_yaml("[1, 2]")


def test_files_that_unfold_to_too_much_are_refused(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(levels))
    with pytest.raises(ConfigError, match="of ordinary size"):
        read_config(path)
    chain = {f"k{n}": f"${{k{n + 1}}}" for n in range(200)} | {"k200": 1}
    with pytest.raises(ConfigError, match="of ordinary size"):
        resolve(chain)
    nested = "${add: " * 300 + "1" + "}" * 300
    with pytest.raises(ConfigError, match=r"of ordinary size|to take numbers"):
        resolve({"a": nested})
    path.write_text("a: " + "x" * 1_000_001)
    with pytest.raises(ConfigError, match="at most 1000000 bytes"):
        read_config(path)


def test_changes_come_before_references(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("{globals: {A: 1}, b: '${globals.A}'}")
    assert read_config(path, ["globals.A=[1, 2]", "new.key=1e-3"]) == {
        "globals": {"A": [1, 2]},
        "b": [1, 2],
        "new": {"key": 0.001},
    }
    for change, message in (("globals", "KEY=VALUE"), ("b.c=3", "through mappings")):
        with pytest.raises(ConfigError, match=message):
            read_config(path, [change])


def test_names_and_sizes_of_vision_transformers():
    assert vit_property("VIT_PARAMS", "vit_base_patch16_448_dino", "NUM_PATCHES") == 784
    assert vit_property("VIT_PARAMS", "vit_large_patch14_dinov2", "FEAT_DIM") == 1024
    assert timm_name("vit_base_patch16_224_mae") == "vit_base_patch16_224.mae"
    assert timm_name("vit_base_patch14_dinov2.lvd142m") == "vit_base_patch14_dinov2.lvd142m"
    assert timm_name("vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    with pytest.raises(ConfigError, match="only the official code registers"):
        timm_name("vit_base_patch16_224_msn")


@pytest.mark.parametrize("name", TEXTS)
def test_omegaconf_reads_the_same(name):
    omegaconf = pytest.importorskip("omegaconf")
    functions = {
        "eval": lambda text, a, b: {"a / 32 * b": a / 32 * b}[text],
        "mul": lambda a, b: a * b,
        "add": lambda a, b: a + b,
    }
    for key, function in functions.items():
        omegaconf.OmegaConf.register_new_resolver(key, function, replace=True)
    try:
        tree = omegaconf.OmegaConf.create(TEXTS[name])
        assert resolve(parse_yaml(TEXTS[name])) == omegaconf.OmegaConf.to_container(tree, resolve=True)
    finally:
        for key in functions:
            omegaconf.OmegaConf.clear_resolver(key)


def test_files_that_are_none(tmp_path):
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path, "no such file"),
        (tmp_path / "no.yml", "no such file"),
        (tmp_path / "binary.yml", "YAML in UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_config(path)


def test_merge_keys():
    tree = parse_yaml("base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}")
    assert tree["more"] == {"a": 1, "b": 3}
    with pytest.raises(ConfigError, match="comes twice"):
        parse_yaml("base: &base {a: 1}\nmore: {<<: *base, b: 3, b: 4}")
