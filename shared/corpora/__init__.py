"""A corpus of plain text from documents of any source: `python -m shared.corpora`."""
