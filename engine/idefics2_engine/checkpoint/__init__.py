"""A model's folder or hub id to weights in the model, and back.

In: the name of a checkpoint or adapter. Out: a loaded ``model.idefics2.Idefics2``, or a written
folder. Each module lets one more thing through: files, headers, names, shapes, values.
Must not import ``prompts``, ``scheduling`` or anything above them.
"""
