"""examples/paper: published settings, parsed by the command line as they are."""

import json
from pathlib import Path

import pytest
import yaml

from ssync_pl.cli import main

PAPER = Path(__file__).resolve().parents[1] / "examples" / "paper"
# What the configurations published with SSync resolve to
PUBLISHED = json.loads((Path(__file__).parent / "golden" / "paper_examples.json").read_text("utf-8"))


@pytest.fixture
def parse(capsys):
    def run(*names):
        words = [word for name in names for word in ("--config", str(PAPER / f"{name}.yaml"))]
        assert main(["fit", *words, "--print_config"]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return run


def test_every_file_is_in_the_record():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {*PUBLISHED, "without_ssync"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_and_the_overlay_that_takes_ssync_away(parse, name):
    config = parse(name)
    callback, *others = config["trainer"]["callbacks"]
    parts = {"model": config["model"], "data": config["data"], "callback": callback}
    found = {key: {**part, **part["init_args"], **part.get("dict_kwargs", {})} for key, part in parts.items()}
    found["trainer"] = config["trainer"]
    for part, settings in PUBLISHED[name].items():
        assert {key: found[part][key] for key in settings} == settings
    without = {**config, "trainer": {**config["trainer"], "callbacks": others}}
    assert parse(name, "without_ssync") == without
