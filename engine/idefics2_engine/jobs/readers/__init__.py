"""The input: files of rows in several formats, read lazily and always the same.

In: the names of files and how to read them. Out: ``JobRow``, a prompt with its parameters or the
error of a bad row. Images are not read. ``job_input`` is the whole way: ``files`` are opened,
``formats`` yield raw rows, and ``rows`` make rows of the job from them.
"""
