"""`python -m ssync_pl` is the command `ssync-pl`."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line of the package; Ctrl-C ends it with 130 from the first import on."""
    try:
        from ssync_pl import cli

        return cli.main()
    except KeyboardInterrupt:  # before `cli.main` could take it
        sys.stderr.write("\nssync-pl: stopped.\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
