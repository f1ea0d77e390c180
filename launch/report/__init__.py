"""From results to one table: seeds, groups, formats, figures, the paper's numbers."""
