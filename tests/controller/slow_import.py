"""A library that takes its time."""

import threading

threading.Event().wait(20.0)
