"""Files that the operator names, local or remote.

In: their names. Out: bytes, unpacked, and errors that name a file as the operator does.
``opened_files`` is the one way to open such a file.
"""
