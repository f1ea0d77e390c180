"""Which runs make a benchmark, and running them here."""
