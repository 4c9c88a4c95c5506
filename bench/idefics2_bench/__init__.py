"""Benchmarks of ``idefics2 bench``, with a module for each suite.

A suite times the engine and the best peer in one process and writes rows of JSON, which ``report``
formats as the tables of the docs. It may import all of the engine and the kernels' catalog.
Results are kept in ``bench/results/``.
"""
