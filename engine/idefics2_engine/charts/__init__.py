"""Charts as SVG from plain data, for pages and as files.

A chart is drawn at any width, and its text is as large at each. Its colors are those of ``STYLE``,
which has a light and a dark set.
"""
