"""transformers' classes on this package's operations, beside transformers: ``idefics2 bench hf``."""
