"""Token ids: cut into chunks, hashed, matched with known texts, planned. No models here."""
