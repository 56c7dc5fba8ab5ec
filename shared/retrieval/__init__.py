"""Passages of documents, an index of them that is updated in place, and search by words and by meaning."""
