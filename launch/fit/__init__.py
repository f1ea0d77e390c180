"""One training or evaluation: recipes, strategies, launchers, resume, what a run records."""
