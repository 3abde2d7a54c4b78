"""Does it work and does it pay here: checks and measurements."""
