"""What several shards say together: duplicates, leaks between sets, names, and the `index.json` beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ssync_pl.data.check_members import ShardFacts
from ssync_pl.data.check_report import Problem
from ssync_pl.data.decode import ALLOWED_EXTENSIONS, member_extension
from ssync_pl.data.index import INDEX_NAME, ShardEntry, parse_index, read_index, write_index
from ssync_pl.data.patterns import is_compressed, is_remote, shard_name
from ssync_pl.errors import ShardError

__all__ = ["compare_shards"]

_TYPICAL_BATCH = 8
_TYPICAL_CONSUMERS = 8


def compare_shards(
    by_set: Mapping[str, Sequence[ShardFacts]], *, rebuild_index: bool = False
) -> tuple[list[Problem], list[str]]:
    """Find what no shard shows by itself.

    Args:
        by_set: What was read of the shards, by name of the set.
        rebuild_index: Write the `index.json` of local folders anew instead of comparing it.

    Returns:
        Problems, and notes on what is worth knowing.

    Raises:
        ShardError: `index.json` cannot be written.

    Example:
        >>> from ssync_pl.data.check_members import SampleFacts
        >>> facts = ShardFacts("https://host/a.tar", 0, (SampleFacts("7", {}), SampleFacts("7", {})), ())
        >>> [problem.kind for problem in _repeated_keys([facts])]
        ['key']
    """
    problems: list[Problem] = []
    notes: list[str] = []
    for shards in by_set.values():
        problems.extend(_repeated_keys(shards))
    problems.extend(_repeated_videos(by_set))
    _shared_names(by_set, problems, notes)
    local = [facts for shards in by_set.values() for facts in shards if not is_remote(facts.shard)]
    _check_indices(local, rebuild_index, problems, notes)
    for name, shards in by_set.items():
        notes.extend(_remote_notes(name, [facts for facts in shards if is_remote(facts.shard)], problems))
        notes.extend(_size_notes(name, shards))
    return problems, notes


def _repeated_keys(shards: Sequence[ShardFacts]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for facts in shards:
        for sample in facts.samples:
            before = first.setdefault(sample.key, facts.shown)
            if before != facts.shown:
                yield _problem_of_key(facts.shown, sample.key, f"it is in {before} too")
        for key, count in Counter(sample.key for sample in facts.samples).items():
            if count > 1:
                yield _problem_of_key(facts.shown, key, f"it comes {count} times in this shard")


def _problem_of_key(shard: str, key: str, what: str) -> Problem:
    message = (
        f"Expected each key once in a set, but {what}. Members of one key must follow each other; rename the rest."
    )
    return Problem("key", shard, key, message)


def _repeated_videos(by_set: Mapping[str, Sequence[ShardFacts]]) -> Iterator[Problem]:
    first: dict[str, tuple[str, str, str]] = {}
    for name, shards in by_set.items():
        for facts in shards:
            for sample in facts.samples:
                if sample.digest is None:
                    continue
                before = first.setdefault(sample.digest, (name, facts.shown, sample.key))
                if before == (name, facts.shown, sample.key):
                    continue
                what = f"its frames are those of {before[1]}, key {before[2]}"
                leak = f", which is of another set ({before[0]}, here {name}): scores on one leak from the other"
                message = f"Expected each video once, but {what}{leak if before[0] != name else ''}. Leave one out."
                yield Problem("content", facts.shown, sample.key, message)


def _shared_names(by_set: Mapping[str, Sequence[ShardFacts]], problems: list[Problem], notes: list[str]) -> None:
    owners: dict[str, set[str]] = {}
    for name, shards in by_set.items():
        first: dict[str, str] = {}
        for facts in shards:
            short = shard_name(facts.shard)
            owners.setdefault(short, set()).add(name)
            before = first.setdefault(short, facts.shown)
            if before != facts.shown:
                message = (
                    f"Expected shards of one set to have names of their own, but {before} has the same: clips are "
                    "drawn by shard name and key. Rename one."
                )
                problems.append(Problem("name", facts.shown, None, message))
    shared = sorted(short for short, names in owners.items() if len(names) > 1)
    if shared:
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        notes.append(f"{shared[0]}{more}: several sets have shards of this name; do not join them in one set.")


def _check_indices(shards: Sequence[ShardFacts], rebuild: bool, problems: list[Problem], notes: list[str]) -> None:
    for folder in dict.fromkeys(Path(facts.shard).parent for facts in shards):
        here = [facts for facts in shards if Path(facts.shard).parent == folder]
        path = folder / INDEX_NAME
        if rebuild:
            _rebuild(folder, here)
            notes.append(f"{path}: written anew.")
            continue
        try:
            known = parse_index(path.read_bytes()).shards
        except FileNotFoundError:
            notes.append(f"{folder}: no {INDEX_NAME}; it is written when the shards are first used.")
            continue
        except (OSError, ShardError) as error:
            problems.append(Problem("index", str(path), None, str(error)))
            continue
        for facts in here:
            before = known.get(Path(facts.shard).name)
            if before is None:
                notes.append(f"{facts.shard}: not in {INDEX_NAME}; it is added when the shards are first used.")
            elif facts.entry is not None and before != facts.entry:
                said = f"{len(before.samples)} samples, {before.size} bytes"
                found = f"{len(facts.entry.samples)} samples, {facts.entry.size} bytes"
                message = (
                    f"Expected {Path(facts.shard).name} as the index says ({said}), but the shard ({found}) differs. "
                    "Run `ssync-pl data check --rebuild-index`."
                )
                problems.append(Problem("index", str(path), None, message))
        gone = sorted(name for name in known if not (folder / name).exists())
        if gone:  # a part of a set, copied with its index, reads well
            notes.append(f"{path}: names {len(gone)} shards that are not there ({gone[0]}, …).")


def _rebuild(folder: Path, shards: Sequence[ShardFacts]) -> None:
    before = read_index(folder)
    entries: dict[str, ShardEntry] = dict(before.shards) if before else {}
    for facts in shards:
        if is_compressed(facts.shard):
            continue  # members of a packed tar cannot be reached one by one
        entries.pop(Path(facts.shard).name, None)
        if facts.entry is not None:
            entries[facts.entry.name] = facts.entry
    present = [entry for entry in entries.values() if (folder / entry.name).exists()]
    try:
        write_index(folder, present, before.recipe if before else {})
    except OSError as error:
        raise ShardError(
            f"Expected to write {folder / INDEX_NAME}, but writing failed ({error}). Free space or change the rights, "
            "or leave out --rebuild-index."
        ) from error


def _remote_notes(name: str, shards: Sequence[ShardFacts], problems: list[Problem]) -> Iterator[str]:
    from ssync_pl.data.remote import fetch_index

    if not shards:
        return
    try:
        entries = fetch_index([facts.shard for facts in shards])
    except ShardError as error:
        problems.append(Problem("index", shards[0].shown, None, str(error)))
        return
    if entries is None:
        yield f"{name}: no {INDEX_NAME} beside the remote shards; only one process can read them."
        return
    for facts, entry in zip(shards, entries, strict=True):
        if any(problem.kind == "shard" for problem in facts.problems):
            continue
        said = [(sample.key, {m: size for m, (_, size) in sample.members.items()}) for sample in entry.samples]
        read = [(sample.key, sample.members) for sample in facts.samples]
        # A stream hands out videos and masks only.
        fits = len(said) == len(read) and all(
            a[0] == b[0] and b[1].items() <= a[1].items() for a, b in zip(said, read, strict=True)
        )
        if not fits:
            message = f"Expected the samples that {INDEX_NAME} names, but the shard differs. Upload both again."
            problems.append(Problem("index", facts.shown, None, message))


def _size_notes(name: str, shards: Sequence[ShardFacts]) -> Iterator[str]:
    videos = sum(len(facts.samples) for facts in shards)
    if videos < _TYPICAL_BATCH:
        yield f"{name}: {videos} videos are less than one batch of {_TYPICAL_BATCH}; lower `batch_size`."
    if len(shards) < _TYPICAL_CONSUMERS and is_remote(shards[0].shard if shards else ""):
        yield f"{name}: {len(shards)} shards; more than that many processes and workers read parts of shards twice."
    unread = Counter(
        member
        for facts in shards
        for sample in facts.samples
        for member in sample.members
        if member_extension(member) not in ALLOWED_EXTENSIONS
    )
    if unread:
        yield f"{name}: members that are never read: " + ", ".join(f"{m} ({n})" for m, n in sorted(unread.items()))
