"""Results files: reading, comparing, and showing them as a page and as charts."""
