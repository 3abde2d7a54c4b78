"""Does it work and does it pay here: checks, measurements, and the sizing of servers."""
