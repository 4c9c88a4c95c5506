"""Formats of the input: a ``Source`` of raw rows for each.

In: the names of files. Out: raw rows, one at a time. ``input_paths`` finds the format of a name, and
``open_sources`` opens it. A module of a format is imported when it is needed.
"""
