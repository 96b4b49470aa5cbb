"""Two real processes under Lightning's DDP, which replaces unknown samplers: ours must stay."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

SCRIPT = """
import json, os, sys
import lightning.pytorch as L
import torch
from ssync_pl.data import ShardDataModule

folder = sys.argv[1]


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {"train": [], "validation": [], "predict": [], "lengths": [], "steps": 0}

    def on_train_epoch_start(self):
        self.seen["train"].append([])
        loader = self.trainer.train_dataloader
        self.seen["lengths"].append(len(loader))
        self.seen["steps"] = self.trainer.estimated_stepping_batches
        self.seen["sampler"] = type(loader.sampler).__name__

    def training_step(self, batch, batch_idx):
        self.seen["train"][-1] += batch["__key__"]
        return self.layer(batch["video"].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["validation"] += list(zip(batch["__key__"], batch["batch_padding_mask"].tolist()))

    def predict_step(self, batch, batch_idx):
        self.seen["predict"] += list(zip(batch["__key__"], batch["batch_padding_mask"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = ShardDataModule(
        train=folder + "/shards/train-*.tar",
        validation=folder + "/shards/validation-*.tar",
        predict=folder + "/shards/validation-*.tar",
        batch_size=2,
        num_workers=1,
        start_method="fork",
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, use_distributed_sampler=True, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )
    model = Model()
    trainer.fit(model, datamodule=data)
    trainer.predict(model, datamodule=data, return_predictions=False)
    with open(f"{folder}/rank{trainer.global_rank}.json", "w") as stream:
        json.dump(model.seen, stream)
"""


def test_two_processes_share_the_data_exactly(make_shards, tmp_path):
    make_shards("train", count=13)
    make_shards("validation", count=5)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Variables of an outer cluster job would tell Lightning that the processes exist already.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PL_", "LOCAL_"))
    }
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    assert [rank["sampler"] for rank in ranks] == ["TrainSampler"] * 2
    assert [rank["lengths"] for rank in ranks] == [[3, 3]] * 2
    assert [rank["steps"] for rank in ranks] == [6, 6]
    for epoch in range(2):
        first, second = (rank["train"][epoch] for rank in ranks)
        assert len(first) == len(second) == 6
        assert len(set(first + second)) == 12
    assert ranks[0]["train"][0] != ranks[0]["train"][1]
    for stage, passes in (("validation", 2), ("predict", 1)):
        assert [len(rank[stage]) for rank in ranks] == [3 * passes] * 2
        real = [key for rank in ranks for key, is_real in rank[stage] if is_real]
        assert sorted(real) == sorted(list("01234") * passes)
