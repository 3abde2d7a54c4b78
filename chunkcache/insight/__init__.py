"""Questions about a prompt: what would be found and why not more; how far from a full run."""
