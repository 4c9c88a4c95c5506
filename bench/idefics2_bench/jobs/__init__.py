"""Figures of offline jobs: ``idefics2 bench jobs``."""
