"""The promises of README and pyproject."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mark", ["first-command", "test-command"])
def test_the_readme_has_its_commands_on_one_line(mark):
    found = re.findall(rf"<!-- {mark} -->\s*```bash\n(.+?)\n```", README, re.S)
    assert len(found) == 1
    assert "\n" not in found[0]


def test_the_readme_names_files_that_exist():
    names = set(re.findall(r"(?:examples|benchmarks|docs)/[\w./-]+\.(?:py|yaml|md|png|csv)", README))
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_readme_lists_every_setting_of_the_callback():
    import inspect

    from ssync_pl import SSyncCallback, SSyncConfig

    settings = set(inspect.signature(SSyncConfig).parameters)
    assert settings <= set(inspect.signature(SSyncCallback).parameters)
    assert not [name for name in settings if f"`{name}`" not in README]


def test_callback_and_configuration_agree_on_defaults():
    from ssync_pl import SSyncCallback, SSyncConfig

    assert SSyncCallback().config == SSyncConfig()
