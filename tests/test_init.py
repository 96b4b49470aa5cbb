"""What `import ssync_pl` costs and offers."""

import json
import subprocess
import sys

import pytest

import ssync_pl

PUBLIC = [
    "AttachedSSync",
    "DenseAlignmentCallback",
    "LightningHost",
    "SSyncCallback",
    "SSyncConfig",
    "SSyncMaps",
    "SSyncOutput",
    "SSyncPictures",
    "SSyncRegularizer",
    "SlotPredictions",
    "StepSeed",
    "ValidationSummary",
    "__version__",
    "attach",
    "ssync_loss",
]
HEAVY = ["lightning", "pytorch_lightning", "torchmetrics", "webdataset", "jsonargparse", "matplotlib", "av"]


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "statement",
    [
        "import ssync_pl",
        "from ssync_pl import SSyncConfig, SSyncMaps, SSyncOutput, attach, ssync_loss",
        "import ssync_pl.method, ssync_pl.method.maps, ssync_pl.errors, ssync_pl.adapters",
    ],
)
def test_pulls_in_nothing_heavy(statement):
    code = f"{statement}; import json, sys; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert run(code) == []


def test_is_quick():
    """Best of three; the limit is generous, since shared machines are slow."""
    code = (
        "import torch, time, json; start = time.perf_counter(); import ssync_pl; first = time.perf_counter() - start; "
        "from ssync_pl import ssync_loss; print(json.dumps([first, time.perf_counter() - start]))"
    )
    times = [run(code) for _ in range(3)]
    assert min(first for first, _ in times) < 0.3
    assert min(both for _, both in times) < 1.0


def test_public_names_are_these():
    assert sorted(ssync_pl.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(ssync_pl))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported_and_is_documented(name):
    value = getattr(ssync_pl, name)
    if name != "__version__":
        assert value.__doc__
        assert value.__name__ == name


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert ssync_pl.__version__ == version("ssync-pl")


def test_unknown_name_lists_the_names():
    with pytest.raises(
        AttributeError, match=r"has no attribute 'SSyncCalback'; public names: .*SSyncCallback.*ssync_loss"
    ):
        _ = ssync_pl.SSyncCalback
    with pytest.raises(ImportError, match="SSyncCalback"):
        from ssync_pl import SSyncCalback  # noqa: F401


def test_submodules_stay_reachable():
    assert (
        run("import ssync_pl.method.maps, json; print(json.dumps(ssync_pl.method.maps.SSyncMaps.__name__))")
        == "SSyncMaps"
    )
