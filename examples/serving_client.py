"""Embeds three sentences through a running server, with the OpenAI client or plain HTTP.

In: the URL of a server that ``turbotx serve`` started. Out: their cosine similarities::

    python examples/serving_client.py http://127.0.0.1:8080
"""

from __future__ import annotations

import json
import sys
import urllib.request

SENTENCES = [
    "A cat sat on the mat.",
    "There was a kitten on the rug.",
    "Interest rates rose again.",
]


def embed_with_http(url: str) -> list[list[float]]:
    """text-embeddings-inference's shape: the vectors alone."""
    body = json.dumps({"inputs": SENTENCES, "truncate": True}).encode()
    request = urllib.request.Request(f"{url}/embed", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        vectors: list[list[float]] = json.load(answer)
    return vectors


def embed_with_openai(url: str) -> list[list[float]]:
    """OpenAI's shape, through its own client."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    found = client.embeddings.create(model="all-MiniLM-L6-v2", input=SENTENCES)
    return [item.embedding for item in found.data]


def main(url: str = "http://127.0.0.1:8080") -> None:
    try:
        vectors = embed_with_openai(url)
    except ImportError:
        vectors = embed_with_http(url)
    for i, first in enumerate(vectors):
        for j in range(i + 1, len(vectors)):
            cosine = sum(a * b for a, b in zip(first, vectors[j], strict=True))
            print(f"{cosine:6.3f}  {SENTENCES[i]} | {SENTENCES[j]}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
