"""The module that a server runs: a transformer and what comes after it, one vector per row.

In: a transformer and the steps of its files. Out: a ``nn.Module`` of ids and mask to a (batch,
width) tensor, optimized as one, so that pooling and projections are compiled with the model::

    SentenceModel(bert, [Pooling(384, ("mean",)), Normalize()])(input_ids=ids, attention_mask=mask)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turbotx.saved.weight_files import load_weights
from turbotx.serving import sentence_files as files


class SentenceModel(nn.Module):
    """Hidden states of the last layer, pooled, then through the other steps."""

    def __init__(self, transformer: nn.Module, steps: Sequence[files.Step]) -> None:
        super().__init__()
        self.transformer = transformer
        self.steps = nn.ModuleList(make_step(step) for step in steps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(batch, seq) int64 each, rows padded on the right. Returns (batch, width)."""
        found = run(self.transformer, input_ids, attention_mask, token_type_ids)
        vectors: Tensor = self.steps[0](found["last_hidden_state"], attention_mask)
        for step in self.steps[1:]:
            vectors = step(vectors)
        return vectors


class TokenModel(nn.Module):
    """Hidden states of the last layer as they are: (batch, seq, width)."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return (batch, seq, width) of (batch, seq) int64 each, rows padded on the right."""
        found = run(self.transformer, input_ids, attention_mask, token_type_ids)
        hidden: Tensor = found["last_hidden_state"]
        return hidden


class SpladeModel(nn.Module):
    """One weight a word of the vocabulary, (batch, vocabulary): most of them are zero."""

    def __init__(self, transformer: nn.Module, step: files.Splade) -> None:
        super().__init__()
        self.transformer = transformer
        self.strategy, self.logarithms = step.strategy, step.logarithms

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return (batch, vocabulary) of (batch, seq) int64 each, rows padded on the right."""
        found = run(self.transformer, input_ids, attention_mask, token_type_ids)
        weights = found["logits"].relu()
        for _ in range(self.logarithms):
            weights = weights.log1p()
        if self.strategy == "max":
            return _max(weights, attention_mask)
        pooled: Tensor = (weights * attention_mask.unsqueeze(-1)).sum(1)
        return pooled


class ClassifierModel(nn.Module):
    """The logits of a model with a classification head."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return logits, (batch, labels), of ids and mask, (batch, seq)."""
        found = run(self.classifier, input_ids, attention_mask, token_type_ids)
        logits: Tensor = found["logits"]
        return logits


class LastTokenClassifier(nn.Module):
    """A decoder's classification head, of the last token that the mask keeps.

    transformers looks for the last token that is not the pad token, and takes one row at a time
    where the configuration has none.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.transformer = getattr(classifier, classifier.base_model_prefix)
        self.score = classifier.score

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return logits, (batch, labels), of the last token that the mask (batch, seq) shows."""
        found = run(self.transformer, input_ids, attention_mask, token_type_ids)
        logits: Tensor = self.score(last_token(found["last_hidden_state"], attention_mask))
        return logits


def run(module: nn.Module, ids: Tensor, mask: Tensor, types: Tensor | None) -> Any:
    """Call a transformer; many of them have no parameter for segment ids."""
    more = {} if types is None else {"token_type_ids": types}
    return module(input_ids=ids, attention_mask=mask, **more)


class Pool(nn.Module):
    """Each mode's vector over the tokens that the mask keeps, side by side."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(batch, seq, width) and (batch, seq) int64 to (batch, width * modes)."""
        pooled = [POOLERS[mode](hidden, mask) for mode in self.modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1)


class Project(nn.Module):
    """A linear layer, its activation, and where the files say so what it was given added."""

    def __init__(self, step: files.Dense) -> None:
        super().__init__()
        kind = getattr(nn, step.activation, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise files.ModelFilesError(f"{step.folder}: torch.nn has no {step.activation}")
        try:
            self.activation_function = kind()
        except TypeError as error:
            raise files.ModelFilesError(
                f"{step.folder}: the activation {step.activation} needs arguments: {error}"
            ) from error
        self.linear = nn.Linear(step.in_features, step.out_features, bias=step.bias)
        self.use_residual = step.residual
        if step.residual and step.in_features != step.out_features:
            self.residual = nn.Linear(step.in_features, step.out_features, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (batch, out_features) of (batch, in_features), the residual added where there
        is one."""
        found: Tensor = self.activation_function(self.linear(vectors))
        if not self.use_residual:
            return found
        return found + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class Norm(nn.Module):
    """LayerNorm over the vector."""

    def __init__(self, step: files.LayerNorm) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(step.width)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (batch, width) vectors, each normalized by mean and variance."""
        found: Tensor = self.norm(vectors)
        return found


class UnitLength(nn.Module):
    """Division of each vector by its length."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (batch, width) vectors of length 1."""
        return nn.functional.normalize(vectors, dim=-1)


class FirstNumbers(nn.Module):
    """The first numbers of each vector, as Matryoshka embeddings allow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (batch, width) of longer vectors."""
        return vectors[:, : self.width]


def make_step(step: files.Step) -> nn.Module:
    """Return the module of a step, its weights read from its folder. Raises WeightsError. Raises
    ModelFilesError for a SpladePooling that is not the first step."""
    if isinstance(step, files.Pooling):
        return Pool(step.modes)
    if isinstance(step, files.Normalize):
        return UnitLength()
    if isinstance(step, files.Cut):
        return FirstNumbers(step.width)
    if isinstance(step, files.Splade):
        raise files.ModelFilesError("SpladePooling takes logits, and nothing may come before it")
    module = Project(step) if isinstance(step, files.Dense) else Norm(step)
    load_weights(module, step.folder)
    return module


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """(batch, width): the last token of each row, which is padded on the right."""
    # Not a gather: a sum of which one token is left is one over packed tokens too.
    place = torch.arange(mask.shape[1], device=mask.device)
    is_last = (place == mask.sum(1, keepdim=True) - 1) & (mask != 0)
    return hidden.masked_fill(is_last.logical_not().unsqueeze(-1), 0.0).sum(1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (_sum(hidden, mask) / _count(mask)).to(hidden.dtype)


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return (_sum(hidden, mask) / _count(mask).sqrt()).to(hidden.dtype)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean in which the n-th token counts n times."""
    weight = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (_sum(hidden, weight) / _count(weight)).to(hidden.dtype)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)


def _sum(hidden: Tensor, weight: Tensor) -> Tensor:
    """Add up in float32, also in half precision, as sentence-transformers does."""
    return (hidden.float() * weight.unsqueeze(-1)).sum(1)


def _count(weight: Tensor) -> Tensor:
    return weight.sum(1, keepdim=True).float()


POOLERS = {
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": last_token,
}
