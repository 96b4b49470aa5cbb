import dataclasses
from pathlib import Path

import pytest
import yaml

from ssync_pl.compare.matrix import Asked, build_matrix
from ssync_pl.compare.sets import parse_numbers, parse_seeds
from ssync_pl.compare.settings import step_words
from ssync_pl.errors import ConfigError


@pytest.fixture
def asked(tmp_path, tiny):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    return Asked((tmp_path / "tiny.yaml",), tmp_path / "out")


def replace(asked, **changes):
    return dataclasses.replace(asked, **changes)


def test_all_combinations_with_the_variants_of_a_seed_side_by_side(asked):
    matrix = build_matrix(replace(asked, seeds=(3, 4), slots=(3, 5), sets=("default", "c")))
    assert len(matrix.runs) == 16
    assert len({run.folder for run in matrix.runs}) == 16
    first, second = matrix.runs[:2]
    assert (first.variant, second.variant) == ("with", "without")
    assert first.seed == second.seed == 3
    assert first.folder == asked.out / "runs" / "default" / "slots_3" / "with" / "seed_3"
    other = [run for run in matrix.runs if (run.set, run.slots, run.variant, run.seed) == ("c", 5, "with", 4)]
    words = other[0].command
    for word in ("--data.init_args.preset=c", "--data.init_args.scene=null", "--model.init_args.num_slots=5"):
        assert word in words
    assert "--seed_everything=4" in words
    assert "--data.init_args.seed=4" in words


def test_the_recipe_holds_all_but_the_seed(asked, tmp_path):
    def recipe(asked, place=0):
        return build_matrix(asked).runs[place].recipe

    own = recipe(asked)
    assert recipe(replace(asked, seeds=(7,), data=tmp_path, device="cpu")) == own
    assert recipe(asked, 1) != own
    for changes in ({"steps": 8}, {"extra": ("--trainer.precision=32",)}, {"slots": (5,)}, {"sets": ("c",)}):
        assert recipe(replace(asked, **changes)) != own, changes
    asked.configs[0].write_text(asked.configs[0].read_text() + "\n")
    assert recipe(asked) != own


def test_sets_and_variants_from_files(asked, tmp_path):
    (tmp_path / "crowd.yaml").write_text("data: {init_args: {num_train: 4}}")
    matrix = build_matrix(replace(asked, sets=(str(tmp_path / "crowd.yaml"),)))
    assert matrix.runs[0].set == "crowd"
    command = matrix.runs[0].command
    # the set lies over the configuration, the variant over both
    assert [Path(command[place + 1]).name for place, word in enumerate(command) if word == "--config"] == [
        "tiny.yaml",
        "crowd.yaml",
        "overlay.yaml",
        "settings.yaml",
    ]


def test_steps_end_with_a_validation():
    for steps in (1, 7, 8, 9, 10, 100):
        words = dict(word.removeprefix("--trainer.").split("=") for word in step_words(steps, {}))
        assert int(words["max_steps"]) % int(words["val_check_interval"]) == 0
    assert step_words(8, {"trainer": {"accumulate_grad_batches": 2}})[-1] == "--trainer.val_check_interval=4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configs": ()}, "Expected --config FILE"),
        ({"configs": (Path("none.yaml"),)}, "there is no 'none.yaml'"),
        ({"variants": ("with", "with")}, "each once, but got with twice"),
        ({"variants": ("with", "nope"), "baseline": "with"}, "but got 'nope'"),
        ({"variants": ("with",)}, "'without' .* among --variants with. Add it, or name another one by --baseline"),
        ({"variants": ("published", "warmup-0.3"), "baseline": "published", "sets": ("x",)}, "among a, a_zoom, .*'x'"),
        ({"sets": ("none.yaml",)}, "Expected --sets to name a YAML file"),
        ({"sets": ("c", "c")}, "each once, but got c twice"),
    ],
)
def test_what_does_not_fit_is_refused(asked, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_matrix(replace(asked, **changes))


def test_another_baseline_can_be_named(asked):
    assert len(build_matrix(replace(asked, variants=("with", "no-merging"), baseline="with")).runs) == 2


def test_variants_that_are_the_same_are_refused(asked, tmp_path):
    (tmp_path / "no.yaml").write_text("trainer: {callbacks: [{class_path: ValidationSummary}]}")
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("trainer: {max_steps: 4}")
    variants = ("without", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"))
    with pytest.raises(ConfigError, match="'a' and 'b' are the same training"):
        build_matrix(replace(asked, variants=variants))


@pytest.mark.parametrize("part", ["data", "model"])
def test_a_configuration_without_a_part_is_refused(asked, tiny, part):
    del tiny[part]
    asked.configs[0].write_text(yaml.safe_dump(tiny))
    with pytest.raises(ConfigError, match=f"to have `{part}` with a `class_path`"):
        build_matrix(asked)


def test_data_of_another_class_has_no_presets_and_no_root(asked, tiny):
    tiny["data"] = {"class_path": "ShardDataModule", "init_args": {"train": "x.tar"}}
    asked.configs[0].write_text(yaml.safe_dump(tiny))
    with pytest.raises(ConfigError, match="SyntheticDataModule for the preset 'c'"):
        build_matrix(replace(asked, sets=("c",)))
    with pytest.raises(ConfigError, match="has no `root`"):
        build_matrix(replace(asked, data=Path("x")))


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "3,x", "3,3", ","])
def test_bad_seeds(text):
    with pytest.raises(ConfigError, match="Expected --seeds"):
        parse_seeds(text)


def test_bad_slots():
    with pytest.raises(ConfigError, match="Expected --slots to be whole numbers from 1 on"):
        parse_numbers("0,3", "--slots")
