"""Features of a frozen backbone, computed once and stored in shards beside those of the videos."""
