"""Checks in fresh environments: the tests on every Python and on the oldest releases, and the package as released.

``nox -s release`` makes what would be uploaded and uses it as a stranger would: outside the checkout, from the wheel.
Requirements behind ``--`` go to pip as well, for example ``nox -s release -- torch==2.14.1 torchvision==0.29.1``.
"""

import shutil
import tarfile
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
SMALL = [  # the quickstart, cut down to a minute
    *("--trainer.max_steps=20", "--trainer.max_epochs=20", "--trainer.check_val_every_n_epoch=2"),
    *("--data.init_args.num_train=16", "--data.init_args.num_validation=4", "--trainer.accelerator=cpu"),
]
IMPORT = """
import sys, time
start = time.perf_counter()
import ssync_pl
took = time.perf_counter() - start
sys.exit(f"the import takes {took:.2f} s, above 1 s" if took > 1 else print(f"import: {took:.2f} s"))
"""
nox.options.sessions = ["tests", "oldest", "release"]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """All tests that need no GPU and take seconds, with the newest releases."""
    session.install("-e", ".[test]")
    session.run("pytest", "-q", *(session.posargs or ["-n", "auto"]))


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """The same with the oldest release of each package that pyproject.toml allows."""
    lowest = str(Path(session.create_tmp()) / "oldest.txt")
    session.install("uv")
    resolve = ["--resolution", "lowest-direct", "--python-version", "3.10", "--quiet"]
    session.run("uv", "pip", "compile", "pyproject.toml", "--extra", "test", *resolve, "--output-file", lowest)
    session.install("-r", lowest)
    session.install("--no-deps", "-e", ".")
    session.run("pytest", "-q", *(session.posargs or ["-n", "auto"]))


@nox.session
def release(session: nox.Session) -> None:
    """Builds sdist and wheel, looks into them, and trains with the wheel in an empty environment."""
    made = Path(session.create_tmp()).resolve()
    for folder in ("dist", "venv", "work"):
        shutil.rmtree(made / folder, ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(made / "dist"))  # the wheel from the sdist
    (wheel,), (sdist,) = (made / "dist").glob("*.whl"), (made / "dist").glob("*.tar.gz")
    session.run("twine", "check", "--strict", str(wheel), str(sdist))
    look_into(session, wheel, sdist)

    session.run("python", "-m", "venv", str(made / "venv"))
    binaries = made / "venv" / "bin"
    pip = [str(binaries / "python"), "-m", "pip"]
    session.run(*pip, "install", "--quiet", f"{wheel}[timm,video,official]", *session.posargs, external=True)
    session.run(*pip, "check", external=True)
    (made / "work").mkdir()
    environment = {"PYTHONPATH": None, "OMP_NUM_THREADS": "1"}
    with session.chdir(made / "work"):
        for command in (
            [str(binaries / "python"), "-c", IMPORT],
            [str(binaries / "ssync-pl"), "--version"],
            [str(binaries / "ssync-pl"), "zoo"],
            [str(binaries / "ssync-pl"), "config", "ssync"],
            [str(binaries / "ssync-pl"), "fit", "--config", str(ROOT / "examples" / "quickstart.yaml"), *SMALL],
        ):
            session.run(*command, external=True, env=environment)
        scores = [*Path().rglob("summary.json")]
        if not scores:
            session.error("Expected a summary.json of the 20 steps, but got none.")


def look_into(session: nox.Session, wheel: Path, sdist: Path) -> None:
    """Fails unless the wheel has every file of the package and no other, and the sdist what the tests need."""
    tracked = session.run("git", "ls-files", external=True, silent=True, log=False).splitlines()
    package = {path.removeprefix("src/") for path in tracked if path.startswith("src/")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    parts = ("src/", "tests/", "docs/", "examples/", "benchmarks/", "README.md", "LICENSE", "CITATION.cff")
    needed = {path for path in tracked if path.startswith(parts)}
    if package != held:
        session.error(f"Expected the wheel to hold the files of src, but they differ in {sorted(package ^ held)}.")
    if not needed <= source:
        session.error(f"Expected the sdist to hold what the tests need, but it lacks {sorted(needed - source)}.")
    session.log(f"{wheel.name}: {len(held)} files, {wheel.stat().st_size >> 10} KiB; {sdist.name}: {len(source)} files")
