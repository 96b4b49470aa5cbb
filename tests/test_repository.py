import inspect
import itertools
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import ssync_pl
from ssync_pl import SSyncConfig
from ssync_pl.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mark", ["first-command", "test-command"])
def test_the_readme_has_its_commands_on_one_line(mark):
    assert len(re.findall(rf"<!-- {mark} -->\s*```bash\n.+\n```", README)) == 1


PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / ".github").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target, _, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", page.read_text("utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{target}#{heading}"


def commands_on(page):
    """The words of each `ssync-pl` command in a page's blocks of code, up to what the shell takes from there."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        for line in re.split(r"&&|\n", block):
            words = shlex.split(re.split(r" -- | > |\|", line)[0], comments=True)
            if words[:1] == ["ssync-pl"]:
                yield words[1:]


def test_commands_on_pages_exist_and_have_these_options(capsys):
    wanted: dict[tuple[str, ...], set[str]] = {}
    for words in (words for page in PAGES for words in commands_on(page)):
        path = tuple(itertools.takewhile(re.compile(r"[a-z][a-z0-9-]*").fullmatch, words))
        trains = path[0] in ("fit", "validate", "test", "predict")  # the last has the options of all
        options = {word.split("=")[0] for word in words if word.startswith("--") and not (trains and "." in word)}
        wanted.setdefault(("predict",) if trains else path, set()).update(options)
    assert len(wanted) >= 12
    for path, options in wanted.items():
        assert main([*path, "--help"]) == 0, path
        known = {*re.findall(r"--\w[\w-]*", capsys.readouterr().out)}
        assert options <= known, path


def test_the_example_of_the_method_card_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "method.md").read_text("utf-8"), re.S)
    exec(compile(block, "method.md", "exec"), {})
    assert "torch.Size([2, 4, 24, 24])" in capsys.readouterr().out


def test_the_readme_keeps_short_and_the_docs_list_every_setting():
    assert len(README.split()) <= 1200
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert not [name for name in inspect.signature(SSyncConfig).parameters if f"`{name}`" not in page]


PUBLIC = {
    "AttachedSSync", "DenseAlignmentCallback", "LightningHost", "SSyncCallback", "SSyncConfig", "SSyncMaps",
    "SSyncOutput", "SSyncPictures", "SSyncRegularizer", "SlotPredictions", "StepSeed", "ValidationSummary",
    "__version__", "attach", "ssync_loss",
}  # fmt: skip
CODE = """
import json, sys, time, torch
seen, start = [], time.perf_counter()
heavy = {"lightning", "pytorch_lightning", "torchmetrics", "webdataset", "jsonargparse", "matplotlib", "av"}
for step in ("import ssync_pl", "from ssync_pl import SSyncConfig, SSyncMaps, SSyncOutput, attach, ssync_loss"):
    exec(step)
    seen.append([time.perf_counter() - start, sorted(heavy & set(sys.modules))])
print(json.dumps(seen))
"""


def test_importing_it_is_quick_and_pulls_in_nothing_heavy():
    """Best of three; the limit is generous, since shared machines are slow."""
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        (first, *heavy), (both, *more) = json.loads(result.stdout)
        assert [heavy, more] == [[[]]] * 2
        if first < 0.3 and both < 1.0:
            return
    pytest.fail(f"the import takes {first:.2f} s, and {both:.2f} s with the method, three times over")


def test_public_names_are_these_and_documented():
    assert sorted(ssync_pl.__all__) == sorted(PUBLIC)
    assert set(dir(ssync_pl)) >= PUBLIC
    for name in PUBLIC - {"__version__"}:
        value = getattr(ssync_pl, name)
        assert value.__doc__
        assert value.__name__ == name
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert not [name for name in PUBLIC - {"__version__"} if not re.search(rf"^(:::|###).*\b{name}$", page, re.M)]
    assert ssync_pl.__version__ == version("ssync-pl")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == re.search('^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[1]
    assert citation["preferred-citation"]["url"] in README


def test_an_unknown_name_lists_the_names():
    with pytest.raises(AttributeError, match=r"SSyncCalback.*SSyncCallback.*ssync_loss"):
        _ = ssync_pl.SSyncCalback
    with pytest.raises(ImportError, match="SSyncCalback"):
        from ssync_pl import SSyncCalback  # noqa: F401
