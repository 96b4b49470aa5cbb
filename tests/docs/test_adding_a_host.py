import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ssync_pl.adapters import base, locate
from ssync_pl.tools.doctor.examine import examine

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding_a_host.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    torch.manual_seed(0)
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    names: dict[str, Any] = {}
    for block in BLOCKS[:2]:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_use(page: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 3
    assert len(BLOCKS[1].split("class GrouperAdapter")[1].splitlines()) <= 15  # an adapter is short
    exec(compile(BLOCKS[2], str(PAGE), "exec"), page)
    promised = re.search(r"print\(ssync.maps\)  # (.*), \.\.\.\)", BLOCKS[2])
    assert promised is not None
    assert capsys.readouterr().out.startswith(promised[1])
    assert page["ssync"].logs["ssync/weight"] == 1


def test_the_maps_are_the_host_s_own(page: dict[str, Any]) -> None:
    host, video, used = page["MyModel"](), torch.rand(2, 3, 3, 16, 24), []
    adapter, keys = locate("auto", host).adapter, list(host.state_dict())
    assert adapter.name == "grouper"
    host.grouper.register_forward_hook(lambda module, args, output: used.append(output[1]))
    capture = adapter.attach(host)
    capture.open()
    host(video)
    capture.close()
    maps = adapter.collect(capture, {"video": video})
    adapter.verify(capture, maps)
    torch.testing.assert_close(maps.attention_logits.softmax(2), torch.stack(used, 1))
    alpha = capture.only("renderer").logits.softmax(2)
    torch.testing.assert_close(maps.mask_probs, alpha.unflatten(4, (6, 2)).unflatten(3, (4, 2)).mean((4, 6)).flatten(3))
    (maps.attention_logits.softmax(2)[:, :, 0].sum() + maps.mask_probs[:, :, 0].sum()).backward()
    assert host.grouper.q.weight.grad.any()
    assert host.renderer.places.grad.any()
    capture.remove()
    assert list(host.state_dict()) == keys


def test_what_the_page_says_without_an_adapter(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(base._REGISTRY, "grouper")
    host, video = page["MyModel"](), torch.rand(2, 3, 3, 16, 24)
    report = examine(host, lambda: host(video).square().mean(), video)
    assert report.ready
    assert report.places == ("softmax:grouper", "softmax:renderer")
    assert report.grid == (4, 6)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(ssync_pl(?:\.\w+)+)`", PAGE.read_text("utf-8")))))
def test_names_that_the_page_mentions_exist(name: str) -> None:
    assert importlib.import_module(name)
