"""The page of a comparison: its figures, its tables, and heat maps of its worst cases."""
