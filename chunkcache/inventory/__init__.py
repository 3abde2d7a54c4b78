"""What a store has: counted, chosen, deleted, and looked into."""
