"""Lint, types and the promises of README and pyproject."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "examples", "benchmarks")
PYTHON_FILES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["lint", "format", "types"]
)
def test_the_sources_are_clean(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_no_file_is_longer_than_five_hundred_lines():
    long = {str(p.relative_to(ROOT)): n for p in PYTHON_FILES if (n := len(p.read_text("utf-8").splitlines())) > 500}
    assert PYTHON_FILES
    assert not long


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
