"""An emulator of Gluon: runs a kernel file on a CPU, each warp group in a thread of its own.

Gluon has no interpreter. This one knows what the kernels use, and assumes the slowest hardware:
products read shared memory only when they are waited for, copies run in any order, and shared
memory begins as NaN. A missing barrier therefore gives a wrong number, and a superfluous one a
program that never ends.

Matrices are float64. What a kernel loads by pointers, or from shared memory that is no matrix,
keeps its type.

- ``loader``: ``load_module`` imports a kernel file with the emulator in the place of Gluon, and can
  change a text of it, to see a test fail.
- ``launch``: a launch runs its programs one after the other, from the last to the first.
- ``program``: the state of the program that runs.
- ``registers``, ``shared_memory``, ``pointers``: where numbers are.
- ``barriers``, ``tma``, ``products``: what is asynchronous.
- ``ptx``: inline assembly.
"""
