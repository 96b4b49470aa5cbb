"""`ssync-pl compare`: the same training under several variants, seeds, slot counts and data sets, and its tables."""
