"""The state of the program that runs: each warp group's thread has its own copy."""

import threading

state = threading.local()
