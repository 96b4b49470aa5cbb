import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_hosts import make_trainer

from ssync_pl import SSyncCallback
from ssync_pl.cli import main
from ssync_pl.tools.doctor.steps import build_model
from tiny_run import tiny_config

BATCH = "2,2,3,4,4"
CALLBACK = {"callbacks": [{"class_path": "SSyncCallback", "init_args": {"adapter": "savi"}}]}


def doctor(*words: str) -> int:
    return main(["doctor", *words])


@pytest.mark.parametrize(
    ("key", "batch"), [("video", "{'video': (2, 2, 3, 4, 4)}"), ("", "(2, 2, 3, 4, 4)"), (0, "[(2, 2, 3, 4, 4)]")]
)
def test_what_it_says_to_write_can_be_written(user_folder, capsys, key, batch):
    assert doctor("user_code:Host", "--init", f"key={key}", "--batch", BATCH) == 0
    captured = capsys.readouterr()
    assert f"batch         {batch}" in captured.out
    assert captured.err == ""
    assert not list(user_folder.glob("lightning_logs"))
    assert doctor("user_code:Host", "--init", f"key={key}", "--batch", BATCH, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ready"], report["shape"], report["kinds"]) == (True, [2, 2, 3, 16], ["logits", "logits"])
    assert report["places"] == ["softmax:net.binder", "softmax:net.painter"]
    line = next(line for line in captured.out.splitlines() if "L.Trainer(" in line)
    callback = eval(line.split("callbacks=[")[1][:-3] + ", warmup_steps=0)", {"SSyncCallback": SSyncCallback})
    model = build_model("user_code:Host", {"key": key})
    trainer = make_trainer(callback, steps=2)
    video = torch.rand(2, 2, 3, 4, 4)
    data = [{"video": {"video": video}, "": video, 0: [video]}[key]] * 2
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None))
    assert "ssync/merged_slots" in trainer.callback_metrics


NET = f"user_code:Net --init slots=5 --batch img={BATCH} --call loss_function --grid 2,8"
ATTACH = r"attach.model, grid=.2, 8., attention='softmax:binder', masks='softmax:painter', total_steps="


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (NET, 0, rf"Net .plain PyTorch.*S=5 N=16, grid 2 x 8.*No adapter knows this host.*{ATTACH}"),
        ("user_code:Regularized", 0, r"adds SSync itself.*ready: nothing to add\.$"),
        ("user_code:Idle", 1, "Idle to call self.ssync, but it does not"),
        ("user_code:Misshaped", 1, "argument `grid` to be .H, W. with H [*] W == 15"),
        (
            "user_code:Net --init kind=time_first --batch 2,3,3,4,4",
            1,
            "masks of frame 2 of the first video to come from",
        ),
        ("user_code:Net --init kind=heads --batch 4,2,3,4,4", 0, "found at +softmax:binder, softmax:painter"),
        ("user_code:Net --init kind=spare", 0, "found at +softmax:binder, softmax:painter"),
        (
            "user_code:Net --init kind=spare --attention softmax:spare --masks softmax:painter",
            0,
            "No gradient goes from",
        ),
        ("user_code:Gives --init what=detached", 1, "a loss with a gradient, but it has none"),
        ("user_code:classifier", 1, "this model has no slots"),
        ("user_code:Tokens", 1, "softmax of 16 on axis 2.*no two such maps"),
        ("user_code:Net --init detach=true", 1, "decoder masks of Net to carry gradient"),
        ("user_code:Host --init automatic=false", 1, "Use the SSyncRegularizer mixin"),
        (
            "user_code:Gives --init what=none",
            1,
            "a loss of one number, but this batch gave NoneType. Was it skipped",
        ),
        ("user_code:Gives --init what=vector", 1, "a loss of one number, but this batch gave .4,."),
        ("user_code:Gives --init what=terms", 1, "a dict with 'loss'"),  # which a training would refuse, too
        ("user_code:Net", 0, "No loss came back: the mean square of the output takes its place"),
        ("user_code:Net --call first_frame", 0, "T=1 .*SSync sees 2 frames of a batch of 4"),
        ("user_code:Net --attention softmax:binder --masks painter", 1, "both maps to have the same slots"),
        ("user_code:Net --attention nowhere --masks painter", 1, "no child 'nowhere'. Its children: eyes, binder"),
        ("user_code:Net --adapter savi", 1, "host that the adapter 'savi' knows"),
        ("user_code:Net --config mine.yaml", 2, "either a model as package.module:name or --config FILE"),
        ("user_code:Net --batch", 2, "shape of a batch, but got none. Add e.g. --batch 2,4,3,64,64"),
        ("user_code:Net --slots 3", 2, "options of ssync-pl doctor, but got --slots 3"),
        ("user_code:Host --init key= --batch 2,2,3,5,5", 2, "it raised RuntimeError: .* [(]user_code.py, line"),
        ("user_code:Host --init key=img", 2, "it raised KeyError: 'img' [(]user_code.py, line"),
        ("user_code:Net --call lose", 2, "have a method 'lose', but it has none"),
        ("user_code:Net --attention binder", 2, "`attention` and `masks` to come together"),
        ("user_code:Net --attention softmax: --masks b", 2, "place as 'path'"),
        ("user_code:Net --grid 4,", 2, "--grid: expected HEIGHTxWIDTH"),
        ("--config nothing.yaml", 2, "nothing.yaml"),
    ],
)
def test_what_it_says(user_folder, capsys, words, status, message):
    given = [] if not words or "--batch" in words or "--config" in words else ["--batch", BATCH]
    assert doctor(*words.removesuffix(" --batch").split(), *given) == status
    captured = capsys.readouterr()
    text = " ".join((captured.err if status == 2 else captured.out).split())
    assert re.search(message, text), text
    assert ("SSync cannot be used as it is:" in text) == (status == 1)
    assert "Traceback" not in captured.err
    assert bool(captured.out) == (status < 2)


@pytest.mark.parametrize(
    ("host", "trainer", "words", "status", "texts"),
    [
        ("SAVi", {"accelerator": "gpu", "devices": 4}, "", 0, ("adapter       savi", "B=2 T=2 S=3 N=64, grid 8 x 8")),
        ("SAVi", {}, "--batch 1,3,3,16,16", 0, ("B=1 T=3 S=3 N=64", "callbacks=[SSyncCallback()]")),
        ("SAVi", CALLBACK, "--model.num_slots 5", 0, ("S=5", "has an SSyncCallback", "nothing to add.")),
        ("user_code.Host", {}, f"--batch {BATCH}", 0, ("softmax:net.painter",)),
        ("SAVi", {}, "--model.num_slot 5", 2, ("num_slot",)),
    ],
)
def test_configurations(user_folder, monkeypatch, capsys, host, trainer, words, status, texts):
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    content = tiny_config(user_folder / "data", **trainer)
    if host != "SAVi":
        content["model"] = {"class_path": host}
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    assert doctor("--config", "mine.yaml", *words.split()) == status
    captured = capsys.readouterr()
    assert all(text in (captured.err if status else captured.out) for text in texts)
    assert Path("data").exists() == (status == 0 and "--batch" not in words)
