"""Serves MiniLM from two replicas on a local Ray until interrupted.

In: nothing. Out: an HTTP server on port 8080, the API of ``turbotx serve``::

    pip install 'ray[serve]' && python examples/serving_ray.py
"""

from __future__ import annotations

import time

from turbotx.serving.ray import run
from turbotx.serving.settings import Settings


def main() -> None:
    run("minilm", replicas=2, port=8080, settings=Settings(max_batch=16, max_batch_tokens=4096))
    print("serving on http://127.0.0.1:8080, try examples/serving_client.py; Ctrl-C ends it")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
