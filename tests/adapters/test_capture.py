from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ssync_pl.adapters import Capture, submodule
from ssync_pl.errors import HostError


def _watched() -> tuple[nn.Linear, Capture]:
    layer, capture = nn.Linear(2, 2), Capture()
    capture.watch("layer", layer)
    return layer, capture


def test_listens_only_inside_the_window() -> None:
    layer, capture = _watched()
    layer(torch.zeros(1, 2))
    assert capture["layer"] == []
    assert not capture.is_open
    capture.open()
    outputs = [layer(torch.full((1, 2), float(i))) for i in range(3)]
    capture.close()
    layer(torch.zeros(1, 2))
    assert all(kept is output for kept, output in zip(capture["layer"], outputs, strict=True))
    capture.clear()
    assert capture["layer"] == []


def test_take_picks_and_does_not_change_the_output() -> None:
    layer, capture = nn.Linear(2, 2), Capture()
    capture.watch("input", layer, lambda module, args, output: args[0])
    capture.open()
    value = torch.randn(1, 2)
    assert isinstance(layer(value), torch.Tensor)
    assert capture.only("input") is value


def test_only_wants_one_call() -> None:
    layer, capture = _watched()
    capture.open()
    with pytest.raises(HostError, match="'layer' to run once inside the training step, but it ran 0 times"):
        capture.only("layer")
    output = layer(torch.zeros(1, 2))
    assert capture.only("layer") is output
    layer(torch.zeros(1, 2))
    with pytest.raises(HostError, match="ran 2 times"):
        capture.only("layer")


def test_silent_modules_are_named() -> None:
    layer, capture = _watched()
    capture.watch("other", nn.Identity())
    assert capture.is_empty
    assert capture.silent == ["layer", "other"]
    capture.open()
    layer(torch.zeros(1, 2))
    assert capture.is_empty
    assert capture.silent == ["other"]


def test_remove_takes_every_hook_off_and_may_be_repeated() -> None:
    layer, capture = _watched()
    capture.watch("again", layer)
    capture.open()
    layer(torch.zeros(1, 2))
    capture.remove()
    capture.remove()
    assert not layer._forward_hooks
    assert not capture.is_open
    assert capture["layer"] == []
    layer(torch.zeros(1, 2))
    assert capture["layer"] == []


def test_a_copied_host_does_not_speak_to_the_original_capture() -> None:
    layer, capture = _watched()
    capture.open()
    layer(torch.zeros(1, 2, requires_grad=True))  # holds a tensor of a graph, which cannot be copied
    twin = copy.deepcopy(layer)
    twin(torch.zeros(1, 2))
    assert len(capture["layer"]) == 1
    copied = copy.deepcopy(capture)
    assert not copied.is_open
    assert copied.silent == []


def test_a_pickled_host_stays_usable() -> None:
    layer = nn.Linear(2, 2)
    capture = Capture()
    capture.watch("layer", layer, lambda module, args, output: output)  # a lambda cannot be pickled
    capture.open()
    layer(torch.zeros(1, 2))
    file = io.BytesIO(pickle.dumps(layer))
    twin = pickle.load(file)
    value = torch.randn(1, 2)
    assert torch.equal(twin(value), layer(value))
    assert len(capture["layer"]) == 2


def test_submodule() -> None:
    host = nn.ModuleDict({"processor": nn.Sequential(nn.Identity(), nn.Linear(1, 3))})
    assert submodule(host, "processor.1").out_features == 3
    with pytest.raises(
        HostError, match=r"module at 'processor.2', but 'processor' has no child '2'. Its children: 0, 1"
    ):
        submodule(host, "processor.2")
    with pytest.raises(HostError, match=r"'ModuleDict' has no child 'decoder'. Its children: processor"):
        submodule(host, "decoder.mlp")
    with pytest.raises(HostError, match=r"'processor.0' has no child 'weight'. Its children: none"):
        submodule(host, "processor.0.weight")


def test_inputs_are_recorded_and_left_alone() -> None:
    layer, capture = nn.Linear(2, 2), Capture()
    capture.watch("input", layer, lambda module, args, kwargs: kwargs["input"], inputs=True)
    value = torch.randn(1, 2)
    expected = layer(value)
    layer(input=value)
    assert capture["input"] == []
    capture.open()
    assert torch.equal(layer(input=value), expected)
    assert capture.only("input") is value
    capture.remove()
    assert not layer._forward_pre_hooks
    twin = copy.deepcopy(layer)
    twin(value)


def test_training_only_leaves_no_grad_out() -> None:
    layer, capture = _watched()
    capture.open(training_only=True)
    with torch.no_grad():
        assert not capture.is_open
        layer(torch.zeros(1, 2))
    assert capture["layer"] == []
    # A part that is frozen in evaluation mode is heard all the same.
    layer.eval()(torch.zeros(1, 2))
    assert len(capture["layer"]) == 1
    capture.open()
    with torch.no_grad():
        layer(torch.zeros(1, 2))
    assert len(capture["layer"]) == 2


def test_copies_of_a_data_parallel_host_are_refused() -> None:
    layer, capture = _watched()
    layer._is_replica = True
    layer(torch.zeros(1, 2))
    capture.open()
    with pytest.raises(HostError, match=r"torch\.nn\.DataParallel runs one per device"):
        layer(torch.zeros(1, 2))


def test_a_step_that_goes_past_hooks_is_told() -> None:
    class Host(nn.Sequential):
        def loss(self, value: torch.Tensor) -> torch.Tensor:
            return self.forward(value).sum()

    host, capture = Host(nn.Linear(2, 2)), Capture()
    capture.watch("host", host)
    capture.watch("0", host[0])
    capture.open()
    capture.refuse_bypass()  # nothing ran yet
    host.loss(torch.zeros(1, 2))
    assert capture.silent == ["host"]
    with pytest.raises(HostError, match=r"hooks on 'host' .* method forward of Host"):
        capture.refuse_bypass()
    host(torch.zeros(1, 2))
    capture.refuse_bypass()
