"""Many prompts of text: documents computed ahead of time, and packs of chunks to share."""
