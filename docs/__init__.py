"""Pages, and the tutorial as code."""
