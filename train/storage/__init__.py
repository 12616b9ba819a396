"""Files that are written completely or not at all, checked records, and locks of folders."""
