from functools import partial
from pathlib import Path

import pytest
import yaml

from ssync_pl.compare.matrix import RunKey, Switch, build_matrix, plan_sharing
from ssync_pl.compare.variants import Variant, make_variant
from ssync_pl.errors import ConfigError
from ssync_pl.plugin.config import SSyncConfig


@pytest.fixture
def build(tmp_path, write_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(build_matrix, [write_config(tmp_path)], Path("out"), seeds="1")


def test_all_combinations_with_the_variants_of_a_seed_side_by_side(build):
    matrix = build(seeds="3,4", slots="3,5")
    assert len(matrix.runs) == len({run.folder for run in matrix.runs}) == 8
    first, second = (run.key for run in matrix.runs[:2])
    assert (first, second) == (RunKey(3, "with", 3), RunKey(3, "without", 3))
    assert first.folder(Path("out")) == Path("out", "runs", "slots_3", "with", "seed_3")
    (other,) = [run for run in matrix.runs if run.key == (5, "with", 4)]
    words = {"--data.init_args.seed=4", "--model.init_args.num_slots=5", "--seed_everything=4"}
    assert words <= set(other.command)
    files = [Path(other.command[place + 1]).name for place, word in enumerate(other.command) if word == "--config"]
    assert files == ["tiny.yaml", "overlay.yaml", "settings.yaml"]
    assert len(build(variants="with,no-merging", baseline="with").runs) == 2
    seeds = {text: [run.key.seed for run in build(seeds=text, variants="without").runs] for text in ("3", "3,4", "3,")}
    assert seeds == {"3": [0, 1, 2], "3,4": [3, 4], "3,": [3]}


def test_the_recipe_holds_all_but_the_seed(build, tmp_path):
    def recipe(place=0, **changes):
        return build(**changes).runs[place].recipe

    own = recipe()
    assert recipe(seeds="7,") == own
    others = [recipe(1), recipe(extra=("--trainer.precision=32",)), recipe(slots="5")]
    with (tmp_path / "tiny.yaml").open("a") as file:
        file.write("\n")
    assert own not in [*others, recipe()]


SLOTCONTRAST = {"class_path": "SlotContrast", "init_args": {"num_slots": 7, "contrast_weight": 0.1}}
SHARDS = {"class_path": "ShardDataModule", "init_args": {"train": "a-{000000..000002}.tar"}}
SEEN = {"class_path": "ShardDataModule", "init_args": {"train": ["a.tar", "b.tar"], "validation": "a.tar"}}
REFUSED = [  # changes of the configuration, options, message
    ({"data": None}, {}, "to have `data` with a `class_path`"),
    ({"model": None}, {}, "to have `model` with a `class_path`"),
    ({"model": {"class_path": "SAVi"}}, {}, "`num_slots` among the options of SAVi"),
    ({"trainer": [1]}, {"variants": "without"}, "`trainer` in .*tiny.yaml to hold keys"),
    ({"data": SEEN}, {}, "validation shards of 'with' .* but got a.tar"),
    ({"model": SLOTCONTRAST}, {"variants": "without,slot-contrast"}, "'without' and 'slot-contrast', which are the"),
    ({}, {"variants": "without,a.yaml,b.yaml"}, "'a' and 'b', which are the same"),
    ({}, {"variants": "without,=a.yaml"}, "begin with a letter"),
    ({}, {"variants": "without,...yaml"}, "begin with a letter"),
    ({}, {"variants": "with,with"}, "each once, but got with twice"),
    ({}, {"variants": "with,nope", "baseline": "with"}, "but got 'nope'"),
    ({}, {"variants": "with"}, "'without' .* among --variants, but got with.* --baseline"),
    *(({}, {"seeds": text}, "Expected --seeds") for text in ("0", "-1", "x", "1.5", "3,x", "3,3", ",", "")),
    ({}, {"slots": "0,3"}, "Expected --slots to be whole numbers from 1 on"),
]


@pytest.mark.parametrize(("changes", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused(build, tiny, changes, options, message):
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny | changes))
    for name in ("a", "b", "=a", ".."):
        Path(f"{name}.yaml").write_text("trainer: {max_steps: 4}")
    with pytest.raises(ConfigError, match=message):
        build(**options)


def plan_of(names, extra=(), data=SHARDS, **options):
    ssync = {"class_path": "SSyncCallback", "init_args": {"warmup_ratio": 0.5, **options}}
    callbacks = [ssync, {"class_path": "ValidationSummary"}]
    config = {"trainer": {"callbacks": callbacks}, "model": SLOTCONTRAST, "data": data}
    variants = [make_variant(name, config) if isinstance(name, str) else name for name in names]
    return plan_sharing(variants, config, extra)


def test_variants_of_ssync_start_from_the_run_without_it():
    names = ["without", "with", "boundary-only", "warmup-0.25", "published", "srl", "no-contrast"]
    plan = plan_of([*names, "ssync-no-contrast", "no-warmup"])
    half, quarter, third = (Switch(ratio, None, SSyncConfig().guard_window) for ratio in (0.5, 0.25, 0.3))
    assert {name: (share.source, share.switch) for name, share in plan.items() if share.source} == {
        "with": ("without", half),
        "boundary-only": ("without", half),
        "warmup-0.25": ("without", quarter),
        "published": ("without", third),
        "ssync-no-contrast": ("no-contrast", half),
    }
    # Dense alignment has parameters of its own, and without a warm-up nothing is the same.
    keeps = {name: share.keeps for name, share in plan.items() if share.keeps}
    assert keeps == {"without": (half, quarter, third), "no-contrast": (half,)}
    # what the configuration itself would start from, for a comparison that grows
    assert plan_of(["without"], warmup_steps=200, guard_window=7)["without"].keeps == (Switch(0.5, 200, 7),)
    assert plan_of(["with", "without"], ["--trainer.precision=32"])["with"].source == "without"
    other = Variant("other", "", {"model": {"init_args": {"contrast_weight": 0.2}}})
    assert plan_of(["without", other])["other"].source is None


def shards(**options):
    return {"class_path": "ShardDataModule", "init_args": options}


APART = [
    {"names": ["with", "no-merging"]},
    {"extra": ["--trainer.callbacks.warmup_ratio=0.1"]},
    {"extra": ["--config=a.yaml"]},
    {"extra": ["--data=Mine"]},
    {"data": {"class_path": "mine.MyData"}},
    {"data": shards(train="a.tar", backend="webdataset")},
    {"data": shards(train=["a.tar", "b.tar.gz"])},
    {"data": shards(train="https://x/a.tar")},
]


@pytest.mark.parametrize("changes", APART)
def test_nothing_is_shared_where_it_may_not_be_the_same(changes):
    plan = plan_of(**({"names": ["with", "without"]} | changes))
    assert all(share.source is None and not share.keeps for share in plan.values())
