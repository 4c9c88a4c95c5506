"""What a job will take, before it runs: its rows, images, tokens, pages and time, and its bad rows.

In: the rows of a job, and the files of a checkpoint without its weights. Out: counts that equal
those of the run, and estimates. Images are opened, not decoded. Nothing needs a GPU.
"""
