"""Worker processes that answer rows, each with an engine of its own.

In: rows, and plain data from which a worker builds its engine. Out: outputs in the order in which
they finish, whatever happens to a worker. The parent process never imports torch.
"""
