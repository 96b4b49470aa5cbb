"""Converters from the original formats of video data sets to shards."""
