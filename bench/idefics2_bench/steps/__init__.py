"""``idefics2 bench steps``: steps of the model divided by operation, each beside its floor."""
