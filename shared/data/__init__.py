"""Data by name, cleaning, near-duplicates, splits. Knows no task."""
