"""Files of a job: the journal of finished rows, the job's folder, and the ordered output.

In: finished rows, in any order. Out: one file with all rows in the order of the input.
Must not import torch, because its tests run thousands of small jobs and start processes.
"""
