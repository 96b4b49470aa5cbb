import copy
import inspect
from pathlib import Path

import pytest
import yaml

from ssync_pl import SSyncConfig, hosts
from ssync_pl.cli.trainer import from_configuration
from ssync_pl.compare.configs import callback_name, callbacks_of, class_of, merge, read_yaml
from ssync_pl.compare.matrix import Asked, build_matrix
from ssync_pl.compare.variants import CONTRAST_DEFAULTS, make_variant, ssync_options
from ssync_pl.errors import ConfigError


def options_after(name, config):
    (options,) = ssync_options(merge(config, make_variant(name, config).overlay))
    return options


def with_contrast(config, weight=0.1):
    model = {"class_path": "SlotContrast", "init_args": {"num_slots": 7, "contrast_weight": weight}}
    return {**config, "model": model}


def test_contrast_weights_are_those_of_the_hosts():
    for host, weight in CONTRAST_DEFAULTS.items():
        assert inspect.signature(getattr(hosts, host)).parameters["contrast_weight"].default == weight


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("boundary-only", {"warmup_ratio": 0.5}, {"warmup_ratio": 0.5, "interior_weight": 0.0}),
        ("interior-only", {}, {"boundary_weight": 0.0}),
        ("no-merging", {}, {"merge": False}),
        ("cross-entropy", {"n_bd": 1}, {"n_bd": 1, "loss": "ce"}),
        ("no-warmup", {"warmup_ratio": 0.5}, {"warmup_ratio": 0.0}),
        ("threshold-0.8", {}, {"merge_threshold": 0.8}),
        ("weight-2", {}, {"relative_weight": 2.0}),
        ("warmup-0.4", {"warmup_steps": 100}, {"warmup_ratio": 0.4}),
        (
            "published",  # keeps how maps are found
            {"attention": "a:x", "relative_weight": 0.1, "warmup_steps": 9},
            {
                "attention": "a:x",
                "warmup_ratio": 0.3,
                "merge_threshold": 0.7,
                "on_collapse": "warn",
                "boundary_weight": 1.0,
                "interior_weight": 1.0,
            },
        ),
    ],
)
def test_a_variant_changes_what_it_says(tiny, name, before, after):
    tiny["trainer"]["callbacks"][0]["init_args"] = before
    kept = copy.deepcopy(tiny)
    assert options_after(name, tiny) == after
    assert tiny == kept


def test_without_with_and_the_dense_rival(tiny):
    merged = merge(tiny, make_variant("without", tiny).overlay)
    assert [callback_name(one) for one in callbacks_of(merged)] == ["ValidationSummary"]
    assert make_variant("with", tiny).overlay == {}
    for options, schedule in (
        ({}, {"warmup_ratio": 0.3}),
        ({"warmup_ratio": 0.5, "loss": "ce"}, {"warmup_ratio": 0.5}),
    ):
        tiny["trainer"]["callbacks"][0]["init_args"] = options
        callbacks = callbacks_of(make_variant("srl", with_contrast(tiny)).overlay)
        assert [callback_name(one) for one in callbacks] == ["DenseAlignmentCallback", "ValidationSummary"]
        assert callbacks[0]["init_args"] == schedule


@pytest.mark.parametrize(
    ("name", "before", "after", "ssync"),
    [
        ("no-contrast", 0.1, 0.0, False),
        ("ssync-no-contrast", 0.1, 0.0, True),
        ("slot-contrast", 0.0, 0.1, False),
        ("ssync-slot-contrast", 0.0, 0.1, True),
    ],
)
def test_contrast_variants(tiny, name, before, after, ssync):
    config = with_contrast(tiny, before)
    merged = merge(config, make_variant(name, config).overlay)
    assert merged["model"]["init_args"] == {"num_slots": 7, "contrast_weight": after}
    assert bool(ssync_options(merged)) == ssync
    if ssync:
        with pytest.raises(ConfigError, match="changes nothing"):
            make_variant(name, with_contrast(tiny, after))


def test_a_file_is_a_variant_of_its_own(tmp_path, tiny):
    for name, text in {
        "bigger": "model: {init_args: {slot_dim: 16}}",
        "same": "model: {init_args: {slot_dim: 8}}",
        "typo": "modle: {init_args: {num_slots: 8}}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    variant = make_variant(str(tmp_path / "bigger.yaml"), tiny)
    assert (variant.name, variant.overlay) == ("bigger", {"model": {"init_args": {"slot_dim": 16}}})
    for name, message in (("same", "changes nothing"), ("typo", "but got modle")):
        with pytest.raises(ConfigError, match=message):
            make_variant(str(tmp_path / f"{name}.yaml"), tiny)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wihtout", "among without, with, published, .*threshold-X.* but got 'wihtout'"),
        ("threshold-", "but got 'threshold-'"),
        ("threshold-1.5", r"merge_threshold.* in \[0, 1\], but got 1.5"),
        ("weight-0", "relative_weight.* above 0"),
        ("warmup-0.5", "changes nothing"),
        ("threshold-0.7", "changes nothing"),
        ("no-contrast", "a host among SlotContrast, VideoSAUR .* but got SAVi"),
        ("srl", "a host among VideoSAUR, .* for variant 'srl', but got SAVi"),
        ("none.yaml", "'none.yaml', which is none"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, name, message):
    with pytest.raises(ConfigError, match=message):
        make_variant(name, tiny)


def test_variants_of_ssync_want_it_in_the_configuration(tiny):
    del tiny["trainer"]["callbacks"][0]
    for name in ("with", "published", "no-merging", "threshold-0.8"):
        with pytest.raises(ConfigError, match="an SSyncCallback"):
            make_variant(name, tiny)


def configured(matrix):
    """What LightningCLI makes of each run's command."""
    found = {}
    for run in matrix.runs:
        run.folder.mkdir(parents=True)
        for name, content in run.files.items():
            (run.folder / name).write_text(yaml.safe_dump(copy.deepcopy(dict(content))))
        found[run.key.variant] = from_configuration(list(run.command[4:]))
    return found


def test_the_command_line_reads_overlays_as_they_are_meant(tmp_path):
    """Options that an overlay does not name stay those of the example."""
    example = Path(__file__).resolve().parents[2] / "examples" / "slotcontrast_synthetic.yaml"
    variants = ("without", "ssync-no-contrast", "threshold-0.8")
    found = configured(build_matrix(Asked((example,), tmp_path / "out", variants, slots=(11,), sets=("a",))))
    for parts in found.values():
        assert (parts.model.hparams["num_slots"], parts.model.hparams["slot_dim"]) == (11, 64)
        assert (parts.datamodule.config.name, parts.datamodule.config.max_objects) == ("a", 10)
    assert [found[name].model.contrast_weight for name in variants] == [0.1, 0.0, 0.1]
    configs = {name: [one.config for one in parts.callbacks if hasattr(one, "config")] for name, parts in found.items()}
    assert configs["without"] == []
    (config,) = configs["threshold-0.8"]
    assert (config.merge_threshold, config.relative_weight, config.warmup_ratio) == (0.8, 0.15, 0.5)


def test_each_process_gets_the_settings_that_the_plan_reckons_with(tmp_path, tiny):
    """Callbacks of a later file are parsed on top of those in their places, and would keep what it leaves out."""
    own = {"warmup_steps": 9, "guard_window": 2, "relative_weight": 0.15, "ramp_steps": 3}
    tiny["trainer"]["callbacks"][0]["init_args"] = own
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    names = ("without", "with", "published", "warmup-0.25")
    matrix = build_matrix(Asked((tmp_path / "tiny.yaml",), tmp_path / "out", names))
    found = configured(matrix)
    for parts in found.values():
        kinds = [type(one).__name__ for one in parts.callbacks]
        for name in ("ValidationSummary", "SSyncPictures", "RunRecorder", "KeepCheckpoints"):
            assert kinds.count(name) == 1
    configs = {
        name: [one.config for one in parts.callbacks if type(one).__name__ == "SSyncCallback"]
        for name, parts in found.items()
    }
    ratio = {key: value for key, value in own.items() if key != "warmup_steps"}
    assert configs == {
        "without": [],
        "with": [SSyncConfig(**own)],
        "published": [SSyncConfig()],
        "warmup-0.25": [SSyncConfig(**ratio, warmup_ratio=0.25)],
    }
    shared = {run.key.variant: run.checkpoint.stem for run in matrix.runs if run.checkpoint is not None}
    assert shared == {"with": "warmup_9_steps_2", "published": "warmup_0.3_50", "warmup-0.25": "warmup_0.25_2"}


def test_the_merge_is_that_of_the_command_line(tmp_path, tiny):
    """LightningCLI itself, on the same files, sees the same callbacks and options."""
    base = {"model": {"class_path": "A", "init_args": {"x": 1}}}
    assert merge(base, {"model": {"class_path": "B"}}) == {"model": {"class_path": "B"}}  # options of another class go
    overs = [
        {"trainer": {"callbacks+": [{"class_path": "SSyncPictures"}]}},
        {"model": {"init_args": {"num_slots": 5}}, "trainer": {"callbacks+": [{"class_path": "StepSeed"}]}},
    ]
    words = []
    for place, over in enumerate([tiny, *overs]):
        (tmp_path / f"{place}.yaml").write_text(yaml.safe_dump(over))
        words += ["--config", str(tmp_path / f"{place}.yaml")]
    found = from_configuration(words)
    merged = merge(merge(tiny, overs[0]), overs[1])
    assert [type(one).__name__ for one in found.callbacks] == [callback_name(one) for one in callbacks_of(merged)]
    assert found.model.hparams["num_slots"] == class_of(merged, "model")[1]["num_slots"] == 5
    assert found.model.hparams["slot_dim"] == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "to hold YAML"),
        (b"a:\n\tb: 1", "to hold YAML"),
        ("a: 1".encode("utf-16"), "YAML in UTF-8"),
        (b"- 1", "keys with values, but got list"),
        (b"", "keys with values, but got nothing"),
    ],
)
def test_files_that_are_no_configuration_are_named(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"a.yaml .*{message}"):
        read_yaml(tmp_path / "a.yaml")
