"""Benchmarks: what ``idefics2 bench`` runs, a module for each suite.

A suite times ours beside the best peer in one process and writes rows of JSON, which ``report``
turns into the tables of the docs. It may import everything of the engine and the kernels' catalog.
Results are kept in ``bench/results/``.
"""
