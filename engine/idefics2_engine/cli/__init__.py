"""The ``idefics2`` command: one file per subcommand, torch loaded only once there is work for it.

Exit codes: 0 answered; 1 it failed while running, and a traceback says where, or standard output is
closed or full, as one line on stderr says; 2 the command line or an input is wrong, and one line on
stderr says which, or the model failed on the request; 130 interrupted; 141 the reader of standard output left, as ``head`` does.
"""
