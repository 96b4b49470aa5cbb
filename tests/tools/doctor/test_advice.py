from __future__ import annotations

from dataclasses import replace

import yaml

from ssync_pl import SSyncCallback
from ssync_pl.tools.doctor.report import CostReport, DoctorReport, MapReport, hints, lines, manual_lines, render_report

WANTED = {"attention": "softmax:a.b", "masks": "c:masks", "masks_kind": "logits", "grid": (8, 18)}
GOOD = DoctorReport(
    host="Net",
    kind="lightning",
    adapter="paths",
    shape=(2, 4, 5, 144),
    grid=(8, 18),
    maps=(
        MapReport("attention", ("a.b",), "logits", (1.0, 1.0), 3, ("a",), 5.0),
        MapReport("masks", ("c",), "logits", (1.0, 1.0), 4, ("a", "c"), 5.0),
    ),
    loss=1.0,
    boundary_loss=0.1,
    interior_loss=0.2,
    boundary_fraction=0.3,
    agreement=0.8,
    merged_slots=0.5,
    cost=CostReport("cpu", 0.01, 2.0, 28 * 2 * 4 * 5 * 144),
)


def test_the_lines_of_python_work() -> None:
    callback = eval(lines("lightning", WANTED)[1].split("callbacks=[")[1][:-2], {"SSyncCallback": SSyncCallback})
    assert callback.adapter.attention == "softmax:a.b"
    assert callback.adapter.masks_kind == "logits"
    assert callback.adapter.grid == (8, 18)


def test_the_lines_of_yaml_work() -> None:
    text = "\n".join(lines("lightning", WANTED)).split("LightningCLI:\n")[1]
    (entry,) = yaml.safe_load(text)["trainer"]["callbacks+"]
    assert entry["class_path"] == "ssync_pl.SSyncCallback"
    callback = SSyncCallback(**entry["init_args"])
    assert callback.adapter.attention == "softmax:a.b"
    assert callback.adapter.grid == (8, 18)
    assert "init_args" not in "\n".join(lines("lightning", {}))


def test_lines_for_loops_and_for_manual_optimization() -> None:
    assert "with attach(model, grid=(8, 18), total_steps=...) as ssync:" in lines("plain", {"grid": (8, 18)})
    assert any("self.manual_backward(self.ssync(loss, maps))" in line for line in manual_lines())


def test_hints() -> None:
    assert hints(GOOD) == ()
    assert "relative_weight=0.1" in hints(replace(GOOD, loss=0.003))[0]
    assert "relative_weight=0.1" in hints(replace(GOOD, loss=2000.0))[0]
    collapsed = replace(GOOD, maps=(GOOD.maps[0], replace(GOOD.maps[1], used_slots=1.5)))
    assert "In the masks, 1.5 of 5 slots win a patch" in hints(collapsed)[0]
    assert "same slot in 30% of the patches only" in hints(replace(GOOD, agreement=0.3))[0]
    probs = replace(GOOD, maps=(replace(GOOD.maps[0], kind="probs"), GOOD.maps[1]))
    assert "merging" in hints(probs)[0] or "not merged" in hints(probs)[0]


def test_the_text() -> None:
    text = render_report(replace(GOOD, lines=("one line",)))
    assert text.splitlines()[0] == "host          Net (LightningModule)"
    assert "maps          B=2 T=4 S=5 N=144, grid 8 x 18" in text
    assert "cost          0.01 s beside 2 s of the host's own step (0.5%), 0.154 MiB, on cpu" in text
    assert "30% of patches at boundaries, 0.5 slots merged" in text
    assert "gradient reaches 4 parameters in a, c" in text
    assert text.endswith("ready. Add:\n  one line")
    assert "sums from 0.5 to 1" in render_report(replace(GOOD, maps=(replace(GOOD.maps[0], sums=(0.5, 1.0)),)))
    assert "at model" in render_report(replace(GOOD, part="model"))
    assert render_report(GOOD).endswith("ready: nothing to add.")
    refused = render_report(replace(GOOD, problems=("No.",), lines=("one line",)))
    assert "SSync cannot be used as it is:\n  - No." in refused
    assert "once that is settled:" in refused


def test_a_loss_that_is_none_and_a_single_slot() -> None:
    assert "loss is nan: nothing can be trained" in hints(replace(GOOD, loss=float("nan")))[0]
    assert GOOD.shape is not None
    single = replace(GOOD, shape=(*GOOD.shape[:2], 1, GOOD.shape[3]), maps=())
    assert "There is one slot" in hints(single)[0]
