"""`ssync-pl predict`: inputs as users have them, long videos in windows, and what is written of each video."""

from __future__ import annotations

from ssync_pl.tools.predict.tracks import SlotTracks, slot_tracks, tracks_csv
from ssync_pl.tools.predict.windows import cut_windows, match_slots

__all__ = ["SlotTracks", "cut_windows", "match_slots", "slot_tracks", "tracks_csv"]
