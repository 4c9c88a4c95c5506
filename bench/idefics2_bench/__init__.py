"""Benchmarks of ``idefics2 bench``, with a module for each suite.

A suite times our implementation and its peers in one process, prints a table and writes rows of
JSON. Recorded rows are in ``bench/results/``. ``report`` writes those of the kernels as the tables
of ``docs/kernels``. A suite may import all of the engine and the kernels' catalog.
"""
