import copy
from dataclasses import fields

import pytest

from ssync_pl.compare.merging import callback_name, callbacks_of, merge
from ssync_pl.compare.variants import CONTRAST_DEFAULTS, DEFAULTS, make_variant
from ssync_pl.errors import ConfigError


def options_after(name, config):
    merged = merge(config, make_variant(name, config).overlay)
    (callback,) = [one for one in callbacks_of(merged) if callback_name(one) == "SSyncCallback"]
    return callback.get("init_args", {})


def with_contrast(config, weight=0.1):
    model = {"class_path": "SlotContrast", "init_args": {"num_slots": 7, "contrast_weight": weight}}
    return {**config, "model": model}


def test_defaults_are_those_of_the_package():
    import inspect

    from ssync_pl import SSyncConfig, hosts

    own = {field.name: field.default for field in fields(SSyncConfig)}
    assert {name: own[name] for name in DEFAULTS} == DEFAULTS
    for host, weight in CONTRAST_DEFAULTS.items():
        assert inspect.signature(getattr(hosts, host)).parameters["contrast_weight"].default == weight


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("boundary-only", "interior_weight", 0.0),
        ("interior-only", "boundary_weight", 0.0),
        ("no-merging", "merge", False),
        ("cross-entropy", "loss", "ce"),
        ("no-warmup", "warmup_ratio", 0.0),
        ("threshold-0.8", "merge_threshold", 0.8),
        ("weight-0.03", "relative_weight", 0.03),
        ("weight-2", "relative_weight", 2.0),
        ("warmup-0.9", "warmup_ratio", 0.9),
    ],
)
def test_a_variant_changes_one_setting(tiny, name, setting, value):
    before = copy.deepcopy(tiny)
    assert options_after(name, tiny) == {"warmup_ratio": 0.5, setting: value}
    assert tiny == before


def test_without_and_with(tiny):
    merged = merge(tiny, make_variant("without", tiny).overlay)
    assert [callback_name(one) for one in callbacks_of(merged)] == ["ValidationSummary"]
    assert make_variant("with", tiny).overlay == {}


def test_published_keeps_how_maps_are_found(tiny):
    tiny["trainer"]["callbacks"][0]["init_args"].update(attention="a:x", masks="b:y", relative_weight=0.1)
    options = options_after("published", tiny)
    assert options["attention"] == "a:x"
    assert options["warmup_ratio"] == 0.3
    assert options["on_collapse"] == "warn"
    assert "relative_weight" not in options


def test_a_warmup_in_steps_gives_way_to_a_ratio(tiny):
    tiny["trainer"]["callbacks"][0]["init_args"] = {"warmup_steps": 100}
    assert options_after("warmup-0.3", tiny) == {"warmup_ratio": 0.3}


def test_the_dense_rival_has_the_same_schedule(tiny):
    callbacks = callbacks_of(make_variant("srl", with_contrast(tiny)).overlay)
    assert [callback_name(one) for one in callbacks] == ["DenseAlignmentCallback", "ValidationSummary"]
    assert callbacks[0]["init_args"] == {"warmup_ratio": 0.5}


def test_contrast_variants(tiny):
    config = with_contrast(tiny)
    merged = merge(config, make_variant("no-contrast", config).overlay)
    assert merged["model"]["init_args"] == {"num_slots": 7, "contrast_weight": 0.0}
    assert "SSyncCallback" not in [callback_name(one) for one in callbacks_of(merged)]
    merged = merge(config, make_variant("ssync-no-contrast", config).overlay)
    assert "SSyncCallback" in [callback_name(one) for one in callbacks_of(merged)]
    config = with_contrast(tiny, 0.0)
    assert make_variant("slot-contrast", config).overlay["model"]["init_args"] == {"contrast_weight": 0.1}
    assert make_variant("ssync-slot-contrast", config).overlay["model"]["init_args"] == {"contrast_weight": 0.1}


def test_a_file_is_a_variant_of_its_own(tmp_path, tiny):
    (tmp_path / "bigger.yaml").write_text("model: {init_args: {slot_dim: 16}}")
    variant = make_variant(str(tmp_path / "bigger.yaml"), tiny)
    assert (variant.name, variant.overlay) == ("bigger", {"model": {"init_args": {"slot_dim": 16}}})
    (tmp_path / "same.yaml").write_text("model: {init_args: {slot_dim: 8}}")
    with pytest.raises(ConfigError, match="changes nothing"):
        make_variant(str(tmp_path / "same.yaml"), tiny)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wihtout", "among without, with, published, .*threshold-X.* but got 'wihtout'"),
        ("threshold-", "but got 'threshold-'"),
        ("threshold-1.5", r"a number in \[0, 1\], but got 1.5"),
        ("weight-0", "a number above 0"),
        ("warmup-0.5", "warmup_ratio 0.5 already"),
        ("threshold-0.7", "merge_threshold 0.7 already"),
        ("no-contrast", "a host with `contrast_weight` .* but got SAVi"),
        ("srl", r"a host that rebuilds features \(VideoSAUR, .*\) for variant 'srl', but got SAVi"),
        ("none.yaml", "there is no 'none.yaml'"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, name, message):
    with pytest.raises(ConfigError, match=message):
        make_variant(name, tiny)


@pytest.mark.parametrize("name", ["with", "published", "no-merging", "srl", "threshold-0.8"])
def test_variants_of_ssync_want_it_in_the_configuration(tiny, name):
    del tiny["trainer"]["callbacks"][0]
    with pytest.raises(ConfigError, match="Expected an SSyncCallback"):
        make_variant(name, tiny)


def test_contrast_that_is_so_already_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"contrast_weight 0\.1 already\. Use `without`"):
        make_variant("slot-contrast", with_contrast(tiny))
    with pytest.raises(ConfigError, match=r"contrast_weight 0\.0 already\. Use `with`"):
        make_variant("ssync-no-contrast", with_contrast(tiny, 0.0))


def test_the_command_line_reads_overlays_as_they_are_meant(tmp_path):
    """Options that an overlay does not name stay those of the example."""
    from pathlib import Path

    import yaml

    from ssync_pl.compare.matrix import Asked, build_matrix
    from ssync_pl.tools.doctor.configured import from_configuration

    example = Path(__file__).resolve().parents[2] / "examples" / "slotcontrast_synthetic.yaml"
    variants = ("without", "ssync-no-contrast", "threshold-0.8")
    matrix = build_matrix(Asked((example,), tmp_path / "out", variants, slots=(11,), sets=("cluttered",)))
    found = {}
    for run in matrix.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "overlay.yaml").write_text(yaml.safe_dump(dict(run.overlay)))
        (run.folder / "settings.yaml").write_text("{}")
        found[run.variant] = from_configuration(list(run.command[4:]))
    for parts in found.values():
        assert parts.host.hparams["num_slots"] == 11
        assert parts.host.hparams["slot_dim"] == 64
        assert (parts.data.config.name, parts.data.config.min_objects) == ("cluttered", 15)
    contrasts = [found[name].host.contrast_weight for name in variants]
    assert contrasts == [0.1, 0.0, 0.1]
    callbacks = {name: {type(one).__name__: one for one in parts.callbacks} for name, parts in found.items()}
    assert "SSyncCallback" not in callbacks["without"]
    config = callbacks["threshold-0.8"]["SSyncCallback"].config
    assert (config.merge_threshold, config.relative_weight, config.warmup_ratio) == (0.8, 0.15, 0.5)


def test_an_own_variant_with_a_misspelt_key_is_refused_at_once(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("modle: {init_args: {num_slots: 8}}", encoding="utf-8")
    with pytest.raises(ConfigError, match="but got modle"):
        make_variant(str(path), {"trainer": {}, "model": {}})
