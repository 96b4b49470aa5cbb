"""Makes the data of a comparison before its runs start, so that parallel runs do not render or cache twice."""

from __future__ import annotations

import sys

from ssync_pl.errors import SSyncError

__all__ = ["prepare"]


def prepare(words: list[str]) -> int:
    """Lets the data module of a configuration make its files; takes the words of `ssync-pl fit`."""
    from ssync_pl.cli.configured import from_configuration  # Lightning takes seconds to import

    try:
        data = from_configuration(words).data
        if data is not None:
            data.prepare_data()
            data.setup("fit")
    except (SSyncError, OSError) as error:
        sys.stderr.write(f"ssync-pl compare: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(prepare(sys.argv[1:]))
