import dataclasses
from pathlib import Path

import pytest
import yaml

from ssync_pl.compare.matrix import Asked, build_matrix, parse_numbers, parse_seeds
from ssync_pl.compare.sharing import Switch, plan_sharing
from ssync_pl.compare.variants import Variant, make_variant
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.config import SSyncConfig


@pytest.fixture
def asked(tmp_path, tiny):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    return Asked((tmp_path / "tiny.yaml",), tmp_path / "out")


def replace(asked, **changes):
    return dataclasses.replace(asked, **changes)


def test_all_combinations_with_the_variants_of_a_seed_side_by_side(asked):
    matrix = build_matrix(replace(asked, seeds=(3, 4), slots=(3, 5), sets=("default", "c")))
    assert len(matrix.runs) == len({run.folder for run in matrix.runs}) == 16
    first, second = matrix.runs[:2]
    assert (first.variant, second.variant) == ("with", "without")
    assert first.seed == second.seed == 3
    assert first.folder == asked.out / "runs" / "default" / "slots_3" / "with" / "seed_3"
    (other,) = [run for run in matrix.runs if (run.set, run.slots, run.variant, run.seed) == ("c", 5, "with", 4)]
    assert {
        "--data.init_args.preset=c",
        "--data.init_args.scene=null",
        "--data.init_args.seed=4",
        "--model.init_args.num_slots=5",
        "--seed_everything=4",
    } <= set(other.command)


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


def test_a_set_lies_over_the_configuration_and_the_variant_over_both(asked, tmp_path):
    (tmp_path / "crowd.yaml").write_text("data: {init_args: {num_train: 4}}")
    run = build_matrix(replace(asked, sets=(str(tmp_path / "crowd.yaml"),))).runs[0]
    assert run.set == "crowd"
    files = [Path(run.command[place + 1]).name for place, word in enumerate(run.command) if word == "--config"]
    assert files == ["tiny.yaml", "crowd.yaml", "overlay.yaml", "settings.yaml"]


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 10, 100])
def test_steps_end_with_a_validation(asked, tiny, steps):
    for gathered in (1, 2):
        tiny["trainer"]["accumulate_grad_batches"] = gathered
        asked.configs[0].write_text(yaml.safe_dump(tiny))
        command = build_matrix(replace(asked, steps=steps)).runs[0].command
        words = dict(word.removeprefix("--trainer.").split("=") for word in command if word.startswith("--trainer."))
        assert int(words["max_steps"]) == steps
        assert steps * gathered % int(words["val_check_interval"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configs": ()}, "Expected --config FILE"),
        ({"configs": (Path("none.yaml"),)}, "there is no 'none.yaml'"),
        ({"variants": ("with", "with")}, "each once, but got with twice"),
        ({"variants": ("with", "nope"), "baseline": "with"}, "but got 'nope'"),
        ({"variants": ("with",)}, "'without' .* among --variants with. Add it, or name another one by --baseline"),
        ({"sets": ("x",)}, "among a, a_zoom, .*'x'"),
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


def test_seeds_and_slots():
    assert (parse_seeds("3"), parse_seeds("3,4"), parse_seeds("3,")) == ((0, 1, 2), (3, 4), (3,))
    for text in ("0", "-1", "x", "1.5", "3,x", "3,3", ","):
        with pytest.raises(ConfigError, match="Expected --seeds"):
            parse_seeds(text)
    with pytest.raises(ConfigError, match="Expected --slots to be whole numbers from 1 on"):
        parse_numbers("0,3", "--slots")


def plan_of(names, extra=(), data=None, **options):
    callbacks = [
        {"class_path": "SSyncCallback", "init_args": {"warmup_ratio": 0.5, **options}},
        {"class_path": "ValidationSummary"},
    ]
    model = {"class_path": "SlotContrast", "init_args": {"contrast_weight": 0.1}}
    data = data or {"class_path": "ShardDataModule", "init_args": {"train": "a-{000000..000002}.tar"}}
    config = {"trainer": {"callbacks": callbacks}, "model": model, "data": data}
    variants = [make_variant(name, config) if isinstance(name, str) else name for name in names]
    return plan_sharing(variants, config, extra)


def nothing_shared(plan):
    return all(share.source is None and not share.keeps for share in plan.values())


def test_variants_of_ssync_start_from_the_run_without_it():
    names = ["without", "with", "boundary-only", "no-merging", "warmup-0.25", "published", "srl", "no-contrast"]
    plan = plan_of([*names, "ssync-no-contrast", "no-warmup"])
    half, quarter, third = (Switch(ratio, None, SSyncConfig().guard_window) for ratio in (0.5, 0.25, 0.3))
    assert {name: share.switch for name, share in plan.items() if share.source == "without"} == {
        "with": half,
        "boundary-only": half,
        "no-merging": half,
        "warmup-0.25": quarter,
        "published": third,
    }
    assert (plan["ssync-no-contrast"].source, plan["ssync-no-contrast"].switch) == ("no-contrast", half)
    # Dense alignment has parameters of its own, and without a warm-up nothing is the same.
    assert all(plan[name].source is None for name in ("without", "srl", "no-contrast", "no-warmup"))
    assert plan["without"].keeps == (half, quarter, third)
    assert plan["no-contrast"].keeps == (half,)
    assert all(not share.keeps for name, share in plan.items() if name not in ("without", "no-contrast"))


def test_a_run_without_ssync_keeps_what_the_configuration_would_start_from():
    assert plan_of(["without"], warmup_steps=200, guard_window=7)["without"].keeps == (Switch(0.5, 200, 7),)


@pytest.mark.parametrize(
    "word",
    ["--trainer.callbacks.warmup_ratio=0.1", "--config=a.yaml", "-c", "--trainer=t.yaml", "--ckpt_path", "--data=Mine"],
)
def test_words_that_may_change_callbacks_share_nothing(word):
    assert nothing_shared(plan_of(["with", "without"], [word]))


def test_only_what_is_the_same_training_until_then_is_shared():
    assert plan_of(["with", "without"], ["--trainer.precision=32"])["with"].source == "without"
    assert nothing_shared(plan_of(["with", "no-merging"]))
    other = Variant("other", "", {"model": {"init_args": {"contrast_weight": 0.2}}})
    assert plan_of(["without", other])["other"].source is None


@pytest.mark.parametrize(
    "data",
    [
        {"class_path": "mine.MyData"},
        {"class_path": "ShardDataModule", "init_args": {"train": "a.tar", "backend": "webdataset"}},
        {"class_path": "ShardDataModule", "init_args": {"train": ["a.tar", "b.tar.gz"]}},
        {"class_path": "ShardDataModule", "init_args": {"train": "https://x/a.tar"}},
    ],
)
def test_data_that_may_not_resume_exactly_is_not_shared(data):
    assert nothing_shared(plan_of(["with", "without"], data=data))
