"""An existing training script, and the two lines that add SSync to it.

Run it with ``python examples/one_callback.py``; ``--help`` lists the options. The two lines are marked with a star.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as L

from ssync_pl import SSyncCallback  # * 1: import
from ssync_pl.data import SyntheticDataModule
from ssync_pl.hosts import SAVi


def main(args: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--videos", type=int, default=64, help="training videos to generate")
    parser.add_argument("--data", default="data/synthetic", help="folder of the generated videos")
    parser.add_argument("--seed", type=int, default=0, help="seed of model and data order")
    options = parser.parse_args(args)

    L.seed_everything(options.seed)
    data = SyntheticDataModule(
        root=options.data, preset="a_zoom", num_train=options.videos, num_validation=8, resolution=64, frames=12,
        batch_size=8, clip_length=2, frame_stride=2, mean=(0.57,) * 3, std=(0.15,) * 3, num_workers=0,
    )  # fmt: skip
    model = SAVi(
        num_slots=8, slot_dim=64, slot_init="learned", feature_dim=64, decoder_channels=(32,), decoder_strides=(2,),
        encoder_channels=(32, 32, 32, 32), encoder_strides=(2, 2, 1, 1), init="fan_in", learning_rate=3e-3,
        warmup_steps=100, decay="exponential", position_scale=0.25, corrector_sharpness=2.0, decoder_position_std=0.5,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=options.steps,
        accelerator="auto",
        gradient_clip_val=1.0,
        callbacks=[SSyncCallback(relative_weight=0.1)],  # * 2: the callback
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data)
    (metrics,) = trainer.validate(model, data, verbose=True)
    return dict(metrics)


if __name__ == "__main__":
    main()
