"""`python -m ssync_pl.cli.prepare WORDS OF fit`: makes the data of a comparison before its runs start in parallel."""

from __future__ import annotations

import sys

from ssync_pl.cli.trainer import from_configuration
from ssync_pl.errors import SSyncError


def prepare(words: list[str]) -> None:
    """Builds the data module of a configuration and lets it make its files."""
    try:
        data = from_configuration(words).data
        if data is not None:
            data.prepare_data()
            data.setup("fit")
    except (SSyncError, OSError) as error:
        raise SystemExit(f"ssync-pl compare: error: {error}") from error


if __name__ == "__main__":
    prepare(sys.argv[1:])
