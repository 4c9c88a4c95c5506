"""Loading and writing of checkpoints.

In: the name of a checkpoint or adapter. Out: a loaded ``model.idefics2.Idefics2``, or a written
folder. Each module checks one more aspect: files, headers, names, shapes, values.
Must not import ``prompts``, ``scheduling`` or anything above them.
"""
