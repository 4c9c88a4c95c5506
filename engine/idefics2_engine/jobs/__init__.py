"""Offline jobs: files of rows in, one file of answers out, whatever happens in between.

In: files, and an engine that answers rows (``row_engine``). Out: one row for every row of the
input, in its order. ``readers`` reads rows, ``writers`` writes the output, ``store`` is the folder
that makes a job resumable. Must not import torch, because its tests run thousands of small jobs and
start processes.
"""
