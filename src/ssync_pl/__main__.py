"""`python -m ssync_pl` is the command `ssync-pl`."""

import sys

from ssync_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
