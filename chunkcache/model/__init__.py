"""What must be known of a model: its identity, and which reuse of its K/V its self-test allows."""
