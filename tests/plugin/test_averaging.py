"""Weight averaging in either order of the callbacks."""

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging
from tiny_hosts import HandWritten, assert_same_weights, assert_untouched, fit, make_callback, make_host

WeightAveraging = getattr(L.callbacks, "WeightAveraging", None)
EMAWeightAveraging = getattr(L.callbacks, "EMAWeightAveraging", None)


def averagers():
    yield pytest.param(lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1), id="swa")
    if WeightAveraging is not None:
        yield pytest.param(WeightAveraging, id="average")
    if EMAWeightAveraging is not None:
        yield pytest.param(lambda: EMAWeightAveraging(decay=0.5), id="ema")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("averager", averagers())
def test_averaged_weights_are_those_of_a_host_that_calls_the_loss_itself(averager, first):
    by_hand, host, callback = make_host(HandWritten), make_host(), make_callback()
    options = {"steps": -1, "max_epochs": 3, "limit_val_batches": 0}
    fit(by_hand, averager(), **options)
    fit(host, *((callback, averager()) if first else (averager(), callback)), **options)
    assert_same_weights(host, by_hand)
    assert_untouched(host)
