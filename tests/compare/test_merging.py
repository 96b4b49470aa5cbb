import pytest
import yaml

from ssync_pl.compare.merging import callback_name, callbacks_of, class_of, merge, merge_all, read_yaml
from ssync_pl.errors import ConfigError


def test_later_lists_replace_and_plus_appends():
    base = {"trainer": {"callbacks": ["A"], "max_steps": 1}}
    assert merge(base, {"trainer": {"callbacks": ["B"]}}) == {"trainer": {"callbacks": ["B"], "max_steps": 1}}
    assert merge(base, {"trainer": {"callbacks+": ["B"]}})["trainer"]["callbacks"] == ["A", "B"]
    assert merge({}, {"trainer": {"callbacks+": {"class_path": "B"}}})["trainer"]["callbacks"] == [{"class_path": "B"}]
    assert base == {"trainer": {"callbacks": ["A"], "max_steps": 1}}


def test_options_of_another_class_go():
    base = {"model": {"class_path": "A", "init_args": {"x": 1}}}
    over = {"model": {"class_path": "B", "init_args": {"y": 2}}}
    assert merge(base, over) == {"model": {"class_path": "B", "init_args": {"y": 2}}}
    assert merge(base, {"model": {"init_args": {"y": 2}}})["model"]["init_args"] == {"x": 1, "y": 2}


def test_the_merge_is_that_of_the_command_line(tmp_path, tiny):
    """LightningCLI itself, on the same files, sees the same callbacks and options."""
    from ssync_pl.tools.doctor.configured import from_configuration

    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tiny))
    overs = [
        {"trainer": {"callbacks+": [{"class_path": "SSyncPictures"}]}},
        {"model": {"init_args": {"num_slots": 5}}, "trainer": {"callbacks+": [{"class_path": "StepSeed"}]}},
    ]
    words = ["--config", str(tmp_path / "a.yaml")]
    for place, over in enumerate(overs):
        (tmp_path / f"{place}.yaml").write_text(yaml.safe_dump(over))
        words += ["--config", str(tmp_path / f"{place}.yaml")]
    found = from_configuration(words)
    merged = merge_all([tiny, *overs])
    assert [type(one).__name__ for one in found.callbacks] == [callback_name(one) for one in callbacks_of(merged)]
    assert found.host.hparams["num_slots"] == class_of(merged, "model")[1]["num_slots"] == 5
    assert found.host.hparams["slot_dim"] == 8


@pytest.mark.parametrize(("content", "message"), [("a: [", "to hold YAML"), ("- 1", "keys with values, but got list")])
def test_files_that_are_no_configuration(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("config", [{}, {"data": {"root": "x"}}, {"data": 3}])
def test_a_configuration_without_data(config):
    with pytest.raises(ConfigError, match="`data` with a `class_path`"):
        class_of(config, "data")
