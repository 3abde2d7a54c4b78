"""Documents, computed ahead of time."""
