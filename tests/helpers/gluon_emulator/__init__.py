"""An emulator of Gluon that runs a kernel file on a CPU, with a thread for each warp group.

Gluon has no interpreter. This one implements the operations that the kernels use, and assumes the
slowest hardware: products read shared memory only when they are waited for, copies run in any
order, and shared memory starts as NaN. A missing barrier therefore gives a wrong number, and a
superfluous one gives a program that never ends.

Matrices are float64. Values that a kernel loads by pointers, or from shared memory that is not a
matrix, keep their type.

- ``loader``: ``load_module`` imports a kernel file with the emulator instead of Gluon. It can also
  change a text of the file, to test that a test fails.
- ``launch``: a launch runs its programs one after another, from the last to the first.
- ``program``: the state of the running program.
- ``registers``, ``shared_memory``, ``pointers``: the places of values.
- ``barriers``, ``tma``, ``products``: asynchronous operations.
- ``ptx``: inline assembly.
"""
