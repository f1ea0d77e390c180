"""A trained network at work: predict, explain, export, publish."""
