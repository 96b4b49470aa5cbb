"""Public configurations and checkpoints of the VideoSAUR family: read, and turned into those of this package."""
