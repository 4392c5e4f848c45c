"""Text generation over HTTP: OpenAI's completions and chats, by continuous batching.

In: prompts that arrive at any time. Out: their tokens as they are made; sequences join the running
batch and leave it between two steps of decoding::

    turbotx serve path/to/llama --task generate
"""
