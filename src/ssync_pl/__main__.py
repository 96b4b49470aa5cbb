"""`python -m ssync_pl` is the command `ssync-pl`; what a process needs around it, whatever ends it, stands here."""

import os
import signal
import sys


def main() -> int:
    """Runs the command line of the package, and returns its exit status: 130 after Ctrl-C, from the first import on."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # names that a terminal cannot show
    try:
        from ssync_pl import cli

        signal.signal(signal.SIGINT, _stop)
        status = cli.main()
        sys.stdout.flush()
    except KeyboardInterrupt:  # before `cli.main` could take it
        os.write(2, b"\nssync-pl: stopped.\n")
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try again at its end, and complain
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"ssync-pl: error: {error}\n")
        return 2
    return status


def _stop(number: int, frame: object) -> None:
    """Ends at once on Ctrl-C while modules are imported, where some swallow the exception and break."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):  # type: ignore[attr-defined]
            os.write(2, b"\nssync-pl: stopped.\n")
            os._exit(130)
        frame = frame.f_back  # type: ignore[attr-defined]
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
