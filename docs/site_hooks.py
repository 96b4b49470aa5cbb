"""MkDocs hooks: pages that lie outside of docs/, and links to them, as they stand in the repository."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".yaml": "yaml", ".py": "python", ".sh": "bash"}
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def site_path(path: str) -> str:
    """Returns where a file of the repository lies in the site, whose root is docs/."""
    path = path.removeprefix("docs/")
    return PAGES.get(path, f"{path}.md" if Path(path).suffix in (*LANGUAGES, ".ipynb") else path)


def notebook_page(text: str) -> str:
    """Turns a notebook into a page: its prose as it is, its code in blocks, no outputs."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)


def _outside() -> list[str]:
    """Lists files outside of docs/ that the site has: pages, examples, and what pages link to."""
    folders = ("benchmarks", "examples")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts]
    return [*PAGES, "LICENSE", *names]


def on_files(files: Any, config: Any) -> Any:
    """Adds them; programs and configurations become pages that show them."""
    for name in _outside():
        source, target = ROOT / name, site_path(name)
        language = LANGUAGES.get(source.suffix)
        if source.suffix == ".ipynb":
            file = File.generated(config, target, content=notebook_page(source.read_text("utf-8")))
        elif language is None:
            file = File.generated(config, target, abs_src_path=str(source))
        else:
            text = f'# {source.name}\n\n```{language} title="{name}"\n{source.read_text("utf-8")}```\n'
            file = File.generated(config, target, content=text)
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    inverse = {target: name for name, target in PAGES.items()}
    here = page.file.src_uri
    outside = here in inverse or here.startswith(("benchmarks/", "examples/"))
    folder = posixpath.dirname(inverse.get(here, here) if outside else f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target = site_path(posixpath.normpath(posixpath.join(folder, match[2])))
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keeps means and their intervals on one line, also in narrow cells of tables."""
    return html.replace(" ± ", "\u00a0±\u00a0")
