"""How a request is sent to a target: one file per protocol of workers. A new one is a file and a line in `Router`."""
