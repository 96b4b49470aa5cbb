"""`ssync-pl compare`: the same training under several variants, seeds and slot counts, and its tables."""
