import inspect
import time

import pytest
import yaml

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.reading import evaluate, read_config

REFERENCES = """
a: {b: 3, same: "${.b}", up: "${..c}", deep: {far: "${...c}", plain: {x: [1]}}}
c: ${a.b}
whole: ${a.deep.plain}
list: [1, "${a.b}", "${ a.b }", null]
other: ["${list[1]}", "${list.0}", "run-${a.b}-${c}"]
"""
RESOLVED = """
a: {b: 3, same: 3, up: 3, deep: {far: 3, plain: {x: [1]}}}
c: 3
whole: {x: [1]}
list: [1, 3, 3, null]
other: [3, 1, run-3-3]
"""
NUMBERS = "{a: 1e-4, b: 3E2, c: 1.5e-8, d: .5, e: 1e, f: '1e-4', g: 12, h: 7e12abf, i: !!str 3}"


@pytest.fixture
def resolve(tmp_path):
    def read(text, *changes):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_config(path, changes)

    return read


def test_references_and_values(resolve):
    assert resolve(REFERENCES) == yaml.safe_load(RESOLVED)
    values = {"a": 1e-4, "b": 300.0, "c": 1.5e-8, "d": 0.5, "e": "1e", "f": "1e-4", "g": 12, "h": "7e12abf", "i": "3"}
    assert resolve(NUMBERS) == values
    assert resolve(b"\xef\xbb\xbfa: 1") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${add: 1, 2, 3}", 6),
        ("${add:3,${mul:${n},2}}", 11),
        ("${eval: 'a / 32 * b', 128, 1e-4}", 0.0004),
        ('${eval: "a - b", 1, 2.5}', -1.5),
        ("${config_prop: VIT_PARAMS, ${vit}, NUM_PATCHES}", 784),
        ("${config_prop:VIT_PARAMS,vit_small_patch14_dinov2,FEAT_DIM}", 384),
    ],
)
def test_functions(resolve, text, value):
    found = resolve(yaml.safe_dump({"n": 4, "vit": "vit_base_patch8_224_dino", "x": {"y": text}}))["x"]["y"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": "${b}", "b": "${a}"}, "refer to themselves"),
        ({"a": "${nowhere.b}"}, "yaml, a: Expected a value at nowhere.b"),
        ({"a": [1], "b": "${a.1}"}, "Expected a value at a.1"),
        ({"a": "${oc.env:HOME}"}, "a: Unsupported"),
        (r'a: "\x24{oc.env:HOME}"', "Unsupported"),
        ({"a": "${${b}:HOME}", "b": "oc.env"}, "Expected references such as"),
        ({"a": "${eval: 'a + b', 1}"}, "'b' is not defined"),
        ({"a": "${add: 1, two}"}, "a number"),
        ({"a": "${mul: 1e18, 1e18}"}, "a number of at most"),
        ({"a": "${sub: 1, 2}"}, "a: Unsupported"),
        ({"a": "${}"}, "yaml, a: "),
        ({"a": "${globals.²}", "globals": [1]}, "yaml, a"),
        ({"a": "${config_prop: PATH, b, c}"}, "FEAT_DIM or NUM_PATCHES"),
    ],
)
def test_bad_references_say_where_and_what(resolve, tree, message):
    with pytest.raises(ConfigError, match=message):
        resolve(tree if isinstance(tree, str) else yaml.safe_dump(tree, allow_unicode=True))


BOMBS = {
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)),
    "alias of itself": "a: &a [*a]",
    "chain": yaml.safe_dump({f"k{n}": f"${{k{n + 1}}}" for n in range(200)} | {"k200": 1}),
    "nested call": yaml.safe_dump({"a": "${add: " * 300 + "1" + "}" * 300}),
    "doubled text": yaml.safe_dump({"s0": "xxxxxxx"} | {f"s{n}": f"${{s{n - 1}}}${{s{n - 1}}}" for n in range(1, 40)}),
    "doubled list": yaml.safe_dump({"s0": "x"} | {f"s{n}": [f"${{s{n - 1}}}"] * 10 for n in range(1, 40)}),
    "doubled keys": yaml.safe_dump(
        {"s0": "x"} | {f"s{n}": {"k" * 1000 + str(i): f"${{s{n - 1}}}" for i in range(10)} for n in range(1, 12)}
    ),
    "nested": "a: " + "[" * 2000,
}
UNREADABLE = [
    *("a: !!timestamp foo", "a: " + "9" * 5000, "a: !!set {a}", "a: !!python/object/apply:os.system ['true']"),
    *("{a: 1, a: 2}", "", "[1, 2]", "a: 1\n---\nb: 2", "a: " + "x" * 200_001, "a: 1".encode("utf-16")),
]


@pytest.mark.parametrize("text", [*BOMBS.values(), *UNREADABLE], ids=lambda text: repr(text[:20]))
def test_what_cannot_be_read_names_the_file_and_soon(resolve, text):
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        resolve(text)
    assert time.process_time() - start < 10


def test_changes_come_before_references(resolve, tmp_path):
    text = "{globals: {A: 1}, b: '${globals.A}'}"
    found = {"globals": {"A": [1, 2]}, "b": [1, 2], "new": {"key": 0.001}}
    assert resolve(text, "globals.A=[1, 2]", "new.key=1e-3") == found
    for change in ("globals", "=1", "new={", "new=${oc.env:HOME}"):
        with pytest.raises(ConfigError):
            resolve(text, change)
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path)


def test_a_function_of_the_same_name_in_the_process_is_left_alone(resolve):
    omegaconf = pytest.importorskip("omegaconf")
    new = "replace" in inspect.signature(omegaconf.OmegaConf.register_resolver).parameters
    register = omegaconf.OmegaConf.register_resolver if new else omegaconf.OmegaConf.register_new_resolver
    register("mul", lambda a, b: "mine", replace=True)
    try:
        assert resolve("a: '${mul: 2, 3}'")["a"] == 6
        assert omegaconf.OmegaConf.create({"a": "${mul:2,3}"}).a == "mine"
    finally:
        omegaconf.OmegaConf.clear_resolver("mul")


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os').system('true')", "a.real", "().__class__", "[1][0]", "lambda: 1", "c", "True", "'a' * 3"),
        *("1 if a else 2", "a < 3", "a and 3", "(a := 3)", "1j", "1 @ 2", "~3", "1 << 40", "f'{a}'", "{1: 2}", ""),
        *("1 +", "9 ** 9", "1e300 * 1e300", "1e400", "1 / 0", "'%0999999999d' % a", "(" * 300),
    ],
)
def test_all_but_arithmetic_is_refused_at_once(text):
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"arithmetic|a number"):
        evaluate(text, 1)
    assert time.process_time() - start < 1
    assert evaluate("(a - c) / b + a * b * -(a - 3)", -7, 3, 0.1) == (-7 - 0.1) / 3 + -7 * 3 * -(-7 - 3)
