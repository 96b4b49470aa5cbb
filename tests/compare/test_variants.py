import copy

import pytest
import yaml

from ssync_pl import SSyncConfig
from ssync_pl.cli.trainer import from_configuration
from ssync_pl.compare import variants
from ssync_pl.compare.matrix import build_matrix
from ssync_pl.compare.variants import callback_name, callbacks_of, make_variant, merge, ssync_options
from ssync_pl.errors import ConfigError

CHANGES = [  # of SSync's options
    ("boundary-only", {"warmup_ratio": 0.5}, {"warmup_ratio": 0.5, "interior_weight": 0.0}),
    ("interior-only", {}, {"boundary_weight": 0.0}),
    ("no-merging", {}, {"merge": False}),
    ("soft-iou", {}, {"merge_by": "soft_iou"}),
    ("cross-entropy", {"n_bd": 1}, {"n_bd": 1, "loss": "ce"}),
    ("no-warmup", {"warmup_ratio": 0.5}, {"warmup_ratio": 0.0}),
    ("threshold-0.8", {}, {"merge_threshold": 0.8}),
    ("weight-2", {"gradient_share": 0.1}, {"relative_weight": 2.0}),
    ("share-0.2", {"relative_weight": 0.1, "n_bd": 1}, {"gradient_share": 0.2, "n_bd": 1}),
    (
        "auto",
        {"relative_weight": 0.1, "warmup_steps": 9, "grid": [3, 4]},
        {"mode": "auto", "warmup_steps": 9, "grid": [3, 4]},
    ),
    ("warmup-0.4", {"warmup_steps": 100}, {"warmup_ratio": 0.4}),
]
REFUSED = [
    ("wihtout", "among without, with, published, .*threshold-X.* but got 'wihtout'"),
    ("threshold-", "but got 'threshold-'"),
    ("threshold-1.5", r"merge_threshold.* in \[0, 1\], but got 1.5"),
    ("weight-0", "relative_weight.* above 0"),
    ("no-contrast", "a host among SlotContrast, VideoSAUR .* but got SAVi"),
    ("srl", "a host among VideoSAUR, .* for variant 'srl', but got SAVi"),
    ("none.yaml", "'none.yaml', which is none"),
]


def with_contrast(config, weight):
    return {**config, "model": {"class_path": "SlotContrast", "init_args": {"num_slots": 7, "contrast_weight": weight}}}


@pytest.mark.parametrize(("name", "before", "after"), CHANGES)
def test_a_variant_changes_what_it_says(tiny, name, before, after):
    tiny["trainer"]["callbacks"][0]["init_args"] = before
    kept = copy.deepcopy(tiny)
    assert ssync_options(merge(tiny, make_variant(name, tiny).overlay)) == [after]
    assert tiny == kept


def test_published_keeps_how_maps_are_found(tiny):
    tiny["trainer"]["callbacks"][0]["init_args"] = {"attention": "a:x", "relative_weight": 0.1, "warmup_steps": 9}
    (options,) = ssync_options(merge(tiny, make_variant("published", tiny).overlay))
    assert options.pop("attention") == "a:x"
    assert SSyncConfig(**options) == SSyncConfig()


def test_without_with_and_the_dense_rival(tiny):
    left = callbacks_of(merge(tiny, make_variant("without", tiny).overlay))
    assert [callback_name(one) for one in left] == ["ValidationSummary"]
    assert make_variant("with", tiny).overlay == {}
    host = {"model": {"class_path": "A", "init_args": {"x": 1}}}  # options of another class go
    assert merge(host, {"model": {"class_path": "B"}}) == {"model": {"class_path": "B"}}
    for options, ratio in (({}, 0.3), ({"warmup_ratio": 0.5, "loss": "ce"}, 0.5)):
        tiny["trainer"]["callbacks"][0]["init_args"] = options
        callbacks = callbacks_of(make_variant("srl", with_contrast(tiny, 0.1)).overlay)
        assert [callback_name(one) for one in callbacks] == ["DenseAlignmentCallback", "ValidationSummary"]
        assert callbacks[0]["init_args"] == {"warmup_ratio": ratio}


def test_contrast_variants(tiny):
    for ssync in (False, True):
        for contrast, before, after in (("no-contrast", 0.1, 0.0), ("slot-contrast", 0.0, 0.1)):
            config = with_contrast(tiny, before)
            merged = merge(config, make_variant("ssync-" * ssync + contrast, config).overlay)
            assert merged["model"]["init_args"] == {"num_slots": 7, "contrast_weight": after}
            assert bool(ssync_options(merged)) == ssync


def test_a_file_is_a_variant_of_its_own(tmp_path, tiny):
    def variant(text):
        (tmp_path / "mine.yaml").write_text(text)
        return make_variant(str(tmp_path / "mine.yaml"), tiny)

    bigger = variant("model: {init_args: {slot_dim: 16}}")
    assert (bigger.name, bigger.overlay) == ("mine", {"model": {"init_args": {"slot_dim": 16}}})
    with pytest.raises(ConfigError, match="but got modle"):
        variant("modle: {init_args: {num_slots: 8}}")


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_what_does_not_fit_is_refused(tiny, name, message):
    with pytest.raises(ConfigError, match=message):
        make_variant(name, tiny)
    del tiny["trainer"]["callbacks"][0]
    for variant in ("with", "published", "no-merging"):
        with pytest.raises(ConfigError, match="an SSyncCallback"):
            make_variant(variant, tiny)


def test_each_process_gets_the_settings_that_the_plan_reckons_with(tmp_path, tiny):
    """Callbacks of a later file are parsed on top of those in their places, and would keep what it leaves out."""
    ratio = {"guard_window": 2, "relative_weight": 0.15, "ramp_steps": 3}
    own = {"warmup_steps": 9, **ratio}
    tiny["trainer"]["callbacks"][0]["init_args"] = own
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    options = {"variants": "without,with,published,auto,warmup-0.25", "slots": "5", "seeds": "1"}
    matrix = build_matrix([tmp_path / "tiny.yaml"], tmp_path / "out", **options)
    configs = {}
    for run in matrix.runs:
        run.folder.mkdir(parents=True)
        for name, content in run.files.items():
            (run.folder / name).write_text(yaml.safe_dump(copy.deepcopy(dict(content))))
        parts = from_configuration(list(run.command[4:]))
        kinds = [type(one).__name__ for one in parts.callbacks]
        assert all(kinds.count(kind) == 1 for kind in ("ValidationSummary", "SSyncPictures"))
        assert all(kinds.count(kind) == 1 for kind in ("RunRecorder", "KeepCheckpoints"))
        assert (parts.model.hparams["num_slots"], parts.model.hparams["slot_dim"]) == (5, 8)
        configs[run.key.variant] = [one.config for one in parts.callbacks if type(one).__name__ == "SSyncCallback"]
    quarter = SSyncConfig(**ratio, warmup_ratio=0.25)
    wanted = {
        "with": [SSyncConfig(**own)],
        "published": [SSyncConfig()],
        "auto": [SSyncConfig(mode="auto", warmup_steps=9)],
        "warmup-0.25": [quarter],
    }
    assert configs == {"without": [], **wanted}
    shared = {run.key.variant: run.checkpoint.stem for run in matrix.runs if run.checkpoint is not None}
    assert shared == {
        "with": "warmup_9_steps_2",
        "auto": "warmup_9_steps_50",
        "published": "warmup_0.3_50",
        "warmup-0.25": "warmup_0.25_2",
    }


@pytest.mark.parametrize("content", [b"a: &a [*a]", b"a: {1: 2, b: 3}", b"a: 2026-99-99", b"[" * 5000])
def test_files_that_are_no_configuration_are_named(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.yaml .*to hold YAML"):
        variants.read_yaml(tmp_path / "a.yaml")
