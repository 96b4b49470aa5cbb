import os
import subprocess
import sys
from pathlib import Path

import pytest

SDK_MODULE = """
import json, sys

def command():
    print(json.dumps(sys.argv))
    return 7
"""
RUN = "import sys; from ssync_pl.cli.lightning_command import main; sys.exit(main())"
ISOLATED = """
from importlib import metadata
import ssync_pl.cli.lightning_command as command
def absent(name):
    raise metadata.PackageNotFoundError(name)
command.metadata.distribution = absent
"""


def run_command(words: list[str], path: Path | None = None, before: str = "") -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [environment.get("PYTHONPATH")])])
    code = f"{before}\nimport sys\nsys.argv[0] = 'lightning'\n{RUN}"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)


@pytest.fixture
def sdk(tmp_path: Path) -> Path:
    (tmp_path / "fake_sdk_cli.py").write_text(SDK_MODULE)
    info = tmp_path / "lightning_sdk-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[console_scripts]\nother = fake_sdk_cli:missing\nlightning = fake_sdk_cli:command\n"
    )
    return tmp_path


@pytest.mark.parametrize("words", [["login", "--now"], ["--help"], [], ["run", "fit"]])
def test_the_sdk_gets_its_words_and_keeps_its_exit_status(sdk: Path, words: list[str]) -> None:
    done = run_command(words, sdk)
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == str(["lightning", *words]).replace("'", '"')


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_training_verbs_are_ours_even_with_the_sdk(sdk: Path, verb: str) -> None:
    before = "import ssync_pl.cli as cli\ncli.main = lambda words: print('ours', words) or 5\n"
    done = run_command([verb, "--config", "x.yaml"], sdk, before)
    assert done.returncode == 5, done.stderr
    assert done.stdout.strip() == f"ours ['{verb}', '--config', 'x.yaml']"


def test_without_the_sdk_other_commands_say_what_is_missing() -> None:
    done = run_command(["login"], before=ISOLATED)
    assert done.returncode == 2
    assert "pip install lightning-sdk" in done.stderr
    assert "ssync-pl" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_without_the_sdk_help_is_ours(words: list[str]) -> None:
    done = run_command(words, before=ISOLATED)
    assert done.returncode == 0
    assert "fit,validate,test,predict" in done.stdout
