"""The same runs as jobs of a cluster."""
