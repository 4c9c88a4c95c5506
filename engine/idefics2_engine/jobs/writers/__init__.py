"""The output: what the row of an answer has, the order of rows, and the formats of files.

In: answers, in any order. Out: one file with all rows in the order of the input.
"""
