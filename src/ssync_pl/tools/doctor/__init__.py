"""`ssync-pl doctor`: whether SSync can be used with a model, and what to write."""
