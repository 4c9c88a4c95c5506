"""The ``idefics2`` command, with one file per subcommand; torch is imported only when needed.

Exit codes: 0 for success; 1 for an internal error, with a traceback, or for a closed or full
standard output; 2 for invalid input or options, or a request that failed, with one line on stderr;
130 after an interrupt; 141 if the reader of standard output has exited, like ``head``.
"""
