"""Text generation over HTTP: OpenAI's completions and chats, by continuous batching.

In: prompts at any time. Out: their tokens as they are generated; sequences join and leave the
running batch between decoding steps::

    turbotx serve path/to/llama --task generate
"""
