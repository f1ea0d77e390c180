"""What a run leaves: results, provenance, atomic files."""
