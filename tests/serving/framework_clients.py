"""What LangChain, LlamaIndex and Haystack ask a server, by their own packages.

In: a server's URL. Out: JSON, the vectors by framework; run by an environment that has the
packages, which is not the one of the tests::

    python tests/serving/framework_clients.py http://127.0.0.1:8080
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

TEXTS = ["w1", "w2 w3 w4"]


def ask_by_langchain(url: str) -> Any:
    from langchain_openai import OpenAIEmbeddings

    client = OpenAIEmbeddings(
        # Without check_embedding_ctx_length=False it sends the ids of OpenAI's own tokenizer.
        model="stand-in", base_url=f"{url}/v1", api_key="k", check_embedding_ctx_length=False,
    )  # fmt: skip
    return [*client.embed_documents(TEXTS), client.embed_query(TEXTS[0])]


def ask_by_llama_index(url: str) -> Any:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    client = OpenAILikeEmbedding(model_name="stand-in", api_base=f"{url}/v1", api_key="k")
    return [*client.get_text_embedding_batch(TEXTS), client.get_query_embedding(TEXTS[0])]


def ask_by_llama_index_for_tei(url: str) -> Any:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    client = TextEmbeddingsInference(
        model_name="any", base_url=url, auth_token="k", query_instruction="",
        text_instruction="",
    )  # fmt: skip
    return [*client.get_text_embedding_batch(TEXTS), client.get_query_embedding(TEXTS[0])]


def ask_by_haystack(url: str) -> Any:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    options: Any = {"api_key": Secret.from_token("k"), "api_base_url": f"{url}/v1", "model": "any"}
    documents = [Document(content=text) for text in TEXTS]
    found = OpenAIDocumentEmbedder(**options, progress_bar=False).run(documents)["documents"]
    query = OpenAITextEmbedder(**options).run(TEXTS[0])["embedding"]
    return [*(document.embedding for document in found), query]


if __name__ == "__main__":
    os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
    asking = (ask_by_langchain, ask_by_llama_index, ask_by_llama_index_for_tei, ask_by_haystack)
    print(json.dumps({ask.__name__: ask(sys.argv[1]) for ask in asking}))
