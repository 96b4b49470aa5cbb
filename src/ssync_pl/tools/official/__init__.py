"""Public configurations and checkpoints of VideoSAUR, SlotContrast, SRL and SSync for the hosts of this package."""
