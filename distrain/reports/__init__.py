"""Reports of finished and running runs, and comparisons, as HTML files."""
