"""`turbotx bench`: every engine in its own process, alternating, on the same inputs."""
