"""Charts as SVG from plain data, for pages and as files.

A chart is drawn at any width, and its text is as large at each. Its colors are those of ``STYLE``,
which has a light and a dark set. The SVG is written by hand. A plotting library's has fixed colors
and sizes, draws text as outlines, and would be a dependency of every report.
"""
