"""The promises of README and pyproject."""

import inspect
import re
from pathlib import Path

import pytest

from ssync_pl import SSyncConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("mark", ["first-command", "test-command"])
def test_the_readme_has_its_commands_on_one_line(mark):
    found = re.findall(rf"<!-- {mark} -->\s*```bash\n(.+?)\n```", README, re.S)
    assert len(found) == 1
    assert "\n" not in found[0]


PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target, _, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", page.read_text("utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{target}#{heading}"


def test_the_readme_keeps_short():
    assert len(README.split()) <= 1200


def test_the_docs_list_every_setting():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert not [name for name in inspect.signature(SSyncConfig).parameters if f"`{name}`" not in page]
