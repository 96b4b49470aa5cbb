"""The house: rooms within their budgets of lines, imports that only run down, a short list of entries at the top."""

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "ssync_pl"
FLOORS = ("errors", "method metrics", "adapters data", "plugin hosts", "rivals tools compare", "cli")
BUDGETS = {"method": 1_300, "metrics": 1_000, "adapters": 2_600, "data": 5_600, "plugin": 1_600, "hosts": 3_000}
BUDGETS |= {"rivals": 500, "tools": 2_400, "compare": 1_900, "cli": 700}
TOTAL = 20_000
ENTRIES = {"__init__.py", "__main__.py", "errors.py", "py.typed", "configs", *BUDGETS}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS, start=1) for room in rooms.split()}
SHELL = ("__init__", "__main__")  # public names and `python -m ssync_pl`: both point at all floors


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def sources() -> dict[Path, str]:
    return {path: path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def lines(room: str) -> int:
    return sum(text.count("\n") for path, text in sources().items() if room_of(path) == room)


def imported_rooms(path: Path, text: str) -> set[str]:
    """Rooms that a file imports from, also inside functions and under TYPE_CHECKING."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative to the file's package
                base = ".".join(["ssync_pl", *path.relative_to(PACKAGE).parts[: -node.level], *filter(None, [base])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    parts = [name.split(".") for name in names if name.startswith("ssync_pl.")]
    return {part[1] for part in parts if part[1] in FLOOR} - {room_of(path)}


def test_imports_only_run_down():
    assert imported_rooms(PACKAGE / "method" / "x.py", "from ssync_pl.cli import main") == {"cli"}  # it can fail
    up = [
        f"{path.relative_to(PACKAGE)} (floor {FLOOR[room_of(path)]}) imports from {room} (floor {FLOOR[room]})"
        for path, text in sources().items()
        if room_of(path) not in SHELL
        for room in imported_rooms(path, text)
        if FLOOR[room] >= FLOOR[room_of(path)]
    ]
    assert not up, "\n".join(up)


def test_every_entry_is_a_room_of_the_house_and_all_keep_within_their_budgets():
    assert {path.name for path in PACKAGE.iterdir()} - {"__pycache__"} == ENTRIES
    assert {room: lines(room) for room, most in BUDGETS.items() if not 0 < lines(room) <= most} == {}
    assert sum(text.count("\n") for text in sources().values()) <= TOTAL
