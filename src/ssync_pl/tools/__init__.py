"""What helps around a training: doctor, predictions, public checkpoints and configurations, pictures, baselines."""
