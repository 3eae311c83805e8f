"""Rows on disk become tokenised documents in a seeded order."""
