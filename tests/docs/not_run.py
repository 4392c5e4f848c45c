"""What of README and docs is not run by the tests, and why; and what a page takes for given.

Everything else is run as it stands. A test fails where an entry fits nothing any more.
"""

from __future__ import annotations

GPU = "needs an NVIDIA GPU"
OF_THE_CHECKOUT = "works on the checkout itself, whose tests these are"

NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", "pip install ."): "downloads the dependencies; the wheel is installed instead",
    ("README.md", "make demo"): "downloads PyTorch; tests/test_examples.py runs the demo",
    ("README.md", "make test"): OF_THE_CHECKOUT,
    ("README.md", "turbotx bench minilm"): "tests/cli/test_bench.py runs each engine on less",
    ("docs/adding-an-op.md", "python -m tests.ops.sweep"): OF_THE_CHECKOUT,
    ("docs/command_line.md", "turbotx COMMAND"): "the form of a command, not one",
    ("docs/development.md", "make test"): OF_THE_CHECKOUT,
    ("docs/development.md", "python -m pip install --dry-run"): "asks a package index",
    ("docs/gpu.md", "python benchmarks/gpu.py"): GPU,
    ("docs/gpu.md", "TURBOTX_BENCHMARK_DRY=1"): "tests/test_gpu_benchmark.py runs it",
    ("docs/gpu.md", "make gpu-ready"): OF_THE_CHECKOUT,
    ("docs/gpu.md", "model = BertModel(config).eval().half()"): GPU,
    ("docs/saving.md", "fast = turbotx.optimize(model)  # on a CPU: no GPU"): GPU,
    ("docs/generation.md", "pip install"): "asks a package index",
    ("docs/generation.md", "turbotx serve path/to/llama"): "the reader's own model",
    ("docs/generation.md", "import openai"): "test_generation_app.py runs it, against a tiny model",
    ("docs/serving.md", "pip install"): "asks a package index",
    ("docs/serving.md", "turbotx serve path/to/model"): "the reader's own model",
    ("docs/serving.md", "turbotx serve minilm path/to/reranker"): "the reader's own model",
    ("docs/guide.md", "from langchain_openai"): "LangChain is no dependency of the tests",
    ("docs/guide.md", "from llama_index"): "LlamaIndex is no dependency of the tests",
    ("docs/guide.md", "fast = turbotx.optimize(model.cuda()"): GPU,
    ("docs/quantization.md", "from torchao"): "torchao is no dependency of the tests",
}
"""(page, how the command or block begins): the reason."""

BERT = """
import torch
import turbotx
from transformers import BertConfig, BertModel
config = BertConfig(vocab_size=1000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=64)
model = BertModel(config).eval()
ids = torch.randint(0, 1000, (2, 12))
mask = torch.ones_like(ids)
"""
GIVEN: dict[str, str] = {
    "README.md": BERT,
    "docs/drop-in.md": BERT,
    "docs/scale.md": BERT,
    "docs/quantization.md": BERT,
    "docs/packed.md": BERT
    + """
flat = torch.randint(0, 1000, (522,))
a, b, c = flat.split([5, 500, 17])
""",
    "docs/saving.md": BERT
    + """
from safetensors.torch import save_file
save_file({k: v.clone() for k, v in model.state_dict().items()}, "weights.safetensors")
""",
    "docs/decoding.md": """
import torch
import turbotx
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=1, n_head=2,
                                   bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
ids = torch.randint(3, 100, (2, 5))
inputs, cache = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, DynamicCache()
""",
    "docs/triton.md": """
import torch
import turbotx
report = turbotx.explain(lambda x, y: (x + y).softmax(-1), torch.randn(3, 8), torch.randn(3, 8))
kernel = report.compiled.assembly.launches[0].kernel
""",
    "docs/memory.md": """
import torch
from turbotx.memory.pool import ChunkPool
largest, footprint_nbytes = [6144, 24576], 30720
""",
}
"""What stands before a page's first block of Python: the names that the page speaks of."""
