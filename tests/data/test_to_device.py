from __future__ import annotations

import time

import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.to_device import DevicePrefetcher


def _batches(count: int) -> list[dict]:
    return [
        {
            "video": torch.full((2, 3), number, dtype=torch.uint8),
            "list": [torch.tensor(number)],
            "__key__": [str(number)],
        }
        for number in range(count)
    ]


def test_on_a_cpu_batches_pass_through_one_at_a_time():
    taken = []

    def source():
        for batch in _batches(3):
            taken.append(batch["__key__"][0])
            yield batch

    batches = DevicePrefetcher("cpu")(source())
    assert next(batches)["__key__"] == ["0"]
    assert taken == ["0"]
    assert [batch["__key__"] for batch in batches] == [["1"], ["2"]]


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 5])
def test_on_cuda_batches_arrive_whole_and_in_order(count):
    batches = list(DevicePrefetcher("cuda")(iter(_batches(count))))
    assert [batch["__key__"] for batch in batches] == [[str(number)] for number in range(count)]
    for number, batch in enumerate(batches):
        assert batch["video"].is_cuda
        assert batch["list"][0].is_cuda
        assert (batch["video"] == number).all()


@pytest.mark.gpu
def test_copies_run_beside_the_computation():
    # 64 MiB a batch from pinned memory, and enough work a step to hide the copy.
    host = [{"video": torch.empty(64 << 20, dtype=torch.uint8).pin_memory()} for _ in range(4)]
    weight = torch.randn(4096, 4096, device="cuda")

    def run(prefetch: bool) -> float:
        source = iter([host[step % 4] for step in range(40)])
        batches = DevicePrefetcher("cuda")(source) if prefetch else ({"video": b["video"].cuda()} for b in source)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in batches:
            for _ in range(4):
                torch.tanh(weight @ weight)
            batch["video"].sum()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    run(True), run(False)
    assert min(run(True) for _ in range(3)) < min(run(False) for _ in range(3))


@pytest.mark.gpu
def test_the_data_module_gives_the_same_batches_on_cuda(make_shards):
    import lightning.pytorch as L

    pattern = make_shards(count=8)

    class Sums(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen: list[tuple] = []

        def training_step(self, batch, batch_idx):
            assert batch["video"].device.type == self.device.type
            self.seen.append((tuple(batch["__key__"]), batch["video"].double().sum().item()))
            return self.layer(batch["video"].mean().view(1, 1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    runs = []
    for accelerator in ("cpu", "cuda"):
        model = Sums()
        trainer = L.Trainer(
            max_epochs=2,
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=ShardDataModule(pattern, batch_size=2, image_size=16, num_workers=0))
        runs.append(model.seen)
    for (keys, total), (cuda_keys, cuda_total) in zip(*runs, strict=True):
        assert keys == cuda_keys
        assert total == pytest.approx(cuda_total, rel=1e-5)
