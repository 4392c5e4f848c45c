"""`turbotx bench`: every engine in a process of its own, in turns, on the same inputs."""
