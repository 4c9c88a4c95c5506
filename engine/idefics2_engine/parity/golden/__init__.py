"""Golden files: answers that others have published or that an earlier version gave."""
