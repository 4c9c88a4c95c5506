"""The commands ``idefics2 run``, ``plan`` and ``merge``.

In: parsed arguments. Out: exit codes. ``run`` and ``plan`` share their options (``job_options``).
"""
