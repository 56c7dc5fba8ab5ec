"""Models in other formats, compared with the original: `python -m shared.export`."""
