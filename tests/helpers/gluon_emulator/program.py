"""The state of the running program; each warp group's thread has its own copy."""

import threading

state = threading.local()
