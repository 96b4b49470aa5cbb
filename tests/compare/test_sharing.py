"""Which runs share their warm-up, and what a run that goes on from another one's gets."""

import json

import pytest

from ssync_pl.compare.curves import read_curve, write_curve
from ssync_pl.compare.sharing import Switch, plan_sharing, shared_steps, take_over
from ssync_pl.compare.variants import Variant, make_variant
from ssync_pl.config import SSyncConfig


def configuration(**options):
    callbacks = [{"class_path": "SSyncCallback", "init_args": options}, {"class_path": "ValidationSummary"}]
    model = {"class_path": "SlotContrast", "init_args": {"contrast_weight": 0.1}}
    return {"trainer": {"callbacks": callbacks}, "model": model, "data": {"class_path": "D"}}


def plan_of(names, extra=(), **options):
    config = configuration(**{"warmup_ratio": 0.5, **options})
    return plan_sharing([make_variant(name, config) for name in names], config, extra)


def test_variants_of_ssync_go_on_from_the_run_without_it():
    names = ["without", "with", "boundary-only", "no-merging", "warmup-0.25", "published", "srl", "no-contrast"]
    plan = plan_of([*names, "ssync-no-contrast", "no-warmup"])
    half, quarter, third = Switch(0.5, None, 50), Switch(0.25, None, 50), Switch(0.3, None, 50)
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


def test_a_run_without_ssync_keeps_what_the_configuration_would_take_over():
    plan = plan_of(["without"], warmup_steps=200, guard_window=7)
    assert plan["without"].keeps == (Switch(0.5, 200, 7),)


def test_without_a_run_without_ssync_nothing_is_shared():
    assert all(share.source is None and not share.keeps for share in plan_of(["with", "no-merging"]).values())


@pytest.mark.parametrize(
    "word", ["--trainer.callbacks.warmup_ratio=0.1", "--config=a.yaml", "--config", "--trainer=t.yaml", "--ckpt_path"]
)
def test_words_that_may_change_callbacks_share_nothing(word):
    assert all(share.source is None and not share.keeps for share in plan_of(["with", "without"], [word]).values())


def test_another_word_changes_nothing():
    assert plan_of(["with", "without"], ["--trainer.precision=32"])["with"].source == "without"


def test_a_variant_that_changes_the_host_does_not_share():
    config = configuration(warmup_ratio=0.5)
    other = Variant("other", "", {"model": {"init_args": {"contrast_weight": 0.2}}})
    plan = plan_sharing([make_variant("without", config), other], config)
    assert plan["other"].source is None


def test_the_window_is_that_of_ssync():
    config = configuration(warmup_ratio=0.5)
    plan = plan_sharing([make_variant(name, config) for name in ("with", "without")], config)
    assert plan["with"].switch.watch == SSyncConfig().guard_window


def test_a_checkpoint_counts_when_both_files_are_there(tmp_path):
    path = tmp_path / "warmup_0.5_50.ckpt"
    assert shared_steps(path) is None
    path.write_bytes(b"x")
    assert shared_steps(path) is None
    path.with_suffix(".json").write_text("{")
    assert shared_steps(path) is None
    path.with_suffix(".json").write_text(json.dumps({"step": 5, "total": 16}))
    assert shared_steps(path) == (5, 16)


def test_the_curve_of_the_warmup_comes_along(tmp_path):
    source, folder = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    (source / "checkpoints").mkdir(parents=True)
    rows = [{"step": str(step), "train/loss": str(1.0 / (1 + step))} for step in range(6)]
    stale = {"step": "2", "train/loss": "7"}
    write_curve(source / "metrics_before.csv", [*rows[:2], stale])  # killed after step 2, gone on from step 2
    write_curve(source / "metrics.csv", [*rows[2:4], {"step": "3", "val/loss": "2"}, *rows[4:]])
    take_over(source / "checkpoints" / "warmup_0.5_50.ckpt", folder, 4)
    kept = read_curve(folder / "metrics_before.csv")
    assert kept == [*rows[:4], {"step": "3", "val/loss": "2"}]
