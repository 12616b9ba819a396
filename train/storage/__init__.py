"""Files that are written completely or not at all, checked records, locks, and the cache folder."""
