"""Which runs share their warm-up, and what a run that goes on from another one's gets."""

import json

import pytest
import yaml

from ssync_pl.compare.matrix import Asked, build_matrix
from ssync_pl.compare.sharing import Switch, plan_sharing, refuse_late, shared_steps, take_over
from ssync_pl.compare.variants import Variant, make_variant
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.tools.doctor.configured import from_configuration


def configuration(**options):
    callbacks = [{"class_path": "SSyncCallback", "init_args": options}, {"class_path": "ValidationSummary"}]
    model = {"class_path": "SlotContrast", "init_args": {"contrast_weight": 0.1}}
    return {"trainer": {"callbacks": callbacks}, "model": model, "data": {"class_path": "ShardDataModule"}}


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
    "word",
    [
        "--trainer.callbacks.warmup_ratio=0.1",
        "--config=a.yaml",
        "--config",
        "-c",
        "--trainer=t.yaml",
        "--ckpt_path",
        "--data=Mine",
        "--data.class_path=Mine",
    ],
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


def test_a_data_module_of_another_kind_does_not_share():
    config = {**configuration(warmup_ratio=0.5), "data": {"class_path": "mine.MyData"}}
    plan = plan_sharing([make_variant(name, config) for name in ("with", "without")], config)
    assert all(share.source is None and not share.keeps for share in plan.values())


def test_a_checkpoint_counts_when_all_of_it_is_there(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "warmup_0.5_50.ckpt"
    assert shared_steps(path) is None
    path.write_bytes(b"x")
    path.with_suffix(".json").write_text("{")
    path.with_name("last.ckpt").write_bytes(b"x")
    (tmp_path / "started.json").write_text("{}")
    assert shared_steps(path) is None
    path.with_suffix(".json").write_text(json.dumps({"step": 5, "total": 16}))
    assert shared_steps(path) == (5, 16)
    (tmp_path / "started.json").unlink()  # its run will begin anew
    assert shared_steps(path) is None
    (tmp_path / "run.json").write_text("{}")
    assert shared_steps(path) == (5, 16)
    path.with_name("last.ckpt").unlink()
    assert shared_steps(path) is None


def test_the_curve_of_the_warmup_comes_along(tmp_path):
    path = tmp_path / "warmup_0.5_50.ckpt"
    take_over(path, tmp_path)
    assert not (tmp_path / "metrics_before.csv").exists()
    path.with_suffix(".csv").write_text("step\n1\n")
    take_over(path, tmp_path)
    assert (tmp_path / "metrics_before.csv").read_text() == "step\n1\n"


def test_a_warmup_of_another_kind_is_refused():
    facts = {"total": 200, "device": "CPU", "torch": "2", "processes": 1}
    refuse_late(95, 95, facts, {**facts, "wall": 1.0})
    with pytest.raises(ConfigError, match="counts slots from step 94 on"):
        refuse_late(94, 95, facts, facts)
    for name in facts:
        with pytest.raises(ConfigError, match=f"trained with {name} .* but it was with other. Pass --no-sharing"):
            refuse_late(95, 95, facts, {**facts, name: "other"})


def test_each_process_gets_the_settings_that_the_plan_reckons_with(tmp_path, tiny):
    """Callbacks of a later file are parsed on top of those in their places, and would keep what it leaves out."""
    own = {"warmup_steps": 9, "guard_window": 2, "relative_weight": 0.15, "ramp_steps": 3}
    tiny["trainer"]["callbacks"][0]["init_args"] = own
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    names = ("without", "with", "published", "warmup-0.25", "no-warmup", "boundary-only")
    matrix = build_matrix(Asked((tmp_path / "tiny.yaml",), tmp_path / "out", names))
    found = {}
    for run in matrix.runs:
        run.folder.mkdir(parents=True)
        for name, content in (("overlay", run.overlay), ("settings", run.settings)):
            (run.folder / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(content))))
        parts = from_configuration(list(run.command[4:]))
        assert {"KeepRun", "RunRecorder"} <= {type(one).__name__ for one in parts.callbacks}
        found[run.variant] = [one.config for one in parts.callbacks if type(one).__name__ == "SSyncCallback"]
    assert found.pop("without") == []
    configs = {name: config for name, (config,) in found.items()}
    assert configs["with"] == SSyncConfig(**own)
    assert configs["boundary-only"] == SSyncConfig(**own, interior_weight=0.0)
    assert configs["published"] == SSyncConfig()
    del own["warmup_steps"]
    assert configs["warmup-0.25"] == SSyncConfig(**own, warmup_ratio=0.25)
    assert configs["no-warmup"] == SSyncConfig(**own, warmup_ratio=0.0)
    shared = {run.variant: run.shared.stem for run in matrix.runs if run.shared is not None}
    assert shared == {
        "with": "warmup_9_steps_2",
        "boundary-only": "warmup_9_steps_2",
        "published": "warmup_0.3_50",
        "warmup-0.25": "warmup_0.25_2",
    }
