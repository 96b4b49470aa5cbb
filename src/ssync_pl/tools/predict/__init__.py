"""`ssync-pl predict`: inputs as users have them, long videos in windows, and what is written of each video."""
