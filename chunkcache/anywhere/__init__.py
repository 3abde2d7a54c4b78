"""Reuse at any position: the index of texts, moving K/V, and repairing what that breaks."""
