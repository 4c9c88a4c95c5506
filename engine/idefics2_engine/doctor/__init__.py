"""What of this machine helps or hinders the engine: one check for each fact, with its fix.

In: package metadata, files of the system, ``nvidia-smi``. Out: a list of ``Check``. Nothing here
uses the network. Only ``deep_child``, which runs in a process of its own, imports torch.
"""
