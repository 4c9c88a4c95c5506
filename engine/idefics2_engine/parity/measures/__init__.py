"""Differences of two recordings, and their verdicts.

In: recordings of A, of B and of the float64 leg. Out: figures for each stage, its verdict, and the
rows of the worst cases.
"""
