"""The command line. Each module holds a few commands; what they need is imported when they run."""
