"""The folder beside an output: its lock, the journal of finished rows, and what the job is.

In: finished rows, in any order, as JSON objects. Out: the same rows after any kill. It knows
nothing about models or formats.
"""
