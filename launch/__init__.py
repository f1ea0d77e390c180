"""Command line, benchmark plan, result store and report."""
