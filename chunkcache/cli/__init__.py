"""The command line. Each module holds a few commands, and imports torch only when one runs."""
