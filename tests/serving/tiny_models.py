"""Small models and tokenizers on disk, as transformers and sentence-transformers save them."""

from __future__ import annotations

import json
import shutil

import torch
import transformers

from tests.serving.conftest import WORDS, word_tokenizer

SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
ROOT = ("modules.json", "config_sentence_transformers.json")  # never in the transformer's folder
TEXTS = ["w1", "w2 w3 w4 w5 w6", "w7 w8", "W9 w10 w11 nothing w12"]


def tokenizer(length=30, **options):
    """One token a word; ``length`` is what its files say is the longest input."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer().tokenizer, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", model_max_length=length, **options,
    )  # fmt: skip


def save(folder, model, **options):
    """The model and its tokenizer in a folder, which is returned."""
    model.eval().save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return folder


def bert(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, **options})
    return randomize(transformers.BertModel(config, add_pooling_layer=False))


def randomize(model):
    """Weights so large that layers, positions and segments all show in the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def to_older_layout(folder, first="0_Transformer"):
    """What sentence-transformers wrote before 5.4: flags of pooling, a folder of the transformer.

    The length stands in ``sentence_bert_config.json``, not in the tokenizer's files.
    """
    modules = json.loads((folder / "modules.json").read_text())
    place = folder / first
    place.mkdir(exist_ok=True)
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ROOT:
            shutil.move(path, place / path.name)
    said = json.loads((place / "tokenizer_config.json").read_text())
    length = said.pop("model_max_length")
    write_json(place / "tokenizer_config.json", said)
    write_json(
        place / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False}
    )
    modules[0]["path"] = first
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
        path = folder / module["path"] / "config.json"
        if module["type"].endswith("Pooling"):
            options = json.loads(path.read_text())
            modes = options["pooling_mode"]
            modes = [modes] if isinstance(modes, str) else modes
            write_json(path, {
                "word_embedding_dimension": options["embedding_dimension"],
                **{f"pooling_mode_{name}": mode in modes for name, mode in (
                    ("cls_token", "cls"), ("mean_tokens", "mean"), ("max_tokens", "max"),
                    ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
                    ("weightedmean_tokens", "weightedmean"), ("lasttoken", "lasttoken"),
                )},
                "include_prompt": True,
            })  # fmt: skip
        elif module["type"].endswith("Normalize"):
            path.unlink()
    write_json(folder / "modules.json", modules)


def write_json(path, data):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(data))


def change_json(path, **fields):
    write_json(path, {**json.loads(path.read_text()), **fields})
