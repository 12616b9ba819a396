"""The commands of `tritium eval`."""
