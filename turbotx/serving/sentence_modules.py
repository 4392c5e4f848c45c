"""Sentence modules: a transformer with pooling and projections as one module.

In: a transformer and the steps of its files. Out: a ``nn.Module`` from ids and mask (batch, seq) to
(batch, width), optimized as a whole, so that pooling is compiled with the model::

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
    """A transformer's last hidden states, pooled, then the remaining steps."""

    def __init__(self, transformer: nn.Module, steps: Sequence[files.Step]) -> None:
        super().__init__()
        self.transformer = transformer
        self.steps = nn.ModuleList(make_step(step) for step in steps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return (batch, width). Inputs: (batch, seq) int64 each, rows padded on the right."""
        found = run(self.transformer, input_ids, attention_mask, token_type_ids)
        vectors: Tensor = self.steps[0](found["last_hidden_state"], attention_mask)
        for step in self.steps[1:]:
            vectors = step(vectors)
        return vectors


class TokenModel(nn.Module):
    """A transformer's last hidden states, (batch, seq, width)."""

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
    """SPLADE: one weight per vocabulary entry, (batch, vocabulary), most of them zero."""

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
    """Logits of a model with a classification head."""

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
    """A decoder's classification head on each row's last token, by the mask.

    transformers looks for the last non-pad token instead, and runs one row at a time if the
    configuration has no pad token.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.transformer = getattr(classifier, classifier.base_model_prefix)
        self.score = classifier.score

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return (batch, labels) logits at each row's last token with a nonzero mask (batch,
        seq)."""
        found = run(self.transformer, input_ids, attention_mask, token_type_ids)
        logits: Tensor = self.score(last_token(found["last_hidden_state"], attention_mask))
        return logits


def run(module: nn.Module, ids: Tensor, mask: Tensor, types: Tensor | None) -> Any:
    """Call a transformer, with segment ids only if given: many models do not take them."""
    more = {} if types is None else {"token_type_ids": types}
    return module(input_ids=ids, attention_mask=mask, **more)


class Pool(nn.Module):
    """Pooling over the unmasked tokens; several modes are concatenated."""

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, width * modes) of (batch, seq, width) and an int64 mask (batch, seq)."""
        pooled = [POOLERS[mode](hidden, mask) for mode in self.modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, -1)


class Project(nn.Module):
    """A linear layer, its activation, and optionally a residual connection."""

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
        """Return (batch, out_features) of (batch, in_features)."""
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
        """Return the LayerNorm of (batch, width) vectors."""
        found: Tensor = self.norm(vectors)
        return found


class UnitLength(nn.Module):
    """L2 normalization of each vector."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (batch, width) vectors scaled to norm 1."""
        return nn.functional.normalize(vectors, dim=-1)


class FirstNumbers(nn.Module):
    """Truncation of Matryoshka embeddings to their first numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the first `width` columns of (batch, ...) vectors."""
        return vectors[:, : self.width]


def make_step(step: files.Step) -> nn.Module:
    """Return the module of a step, with weights from its folder. Raises WeightsError, and
    ModelFilesError for a SpladePooling that is not the first step."""
    if isinstance(step, files.Pooling):
        return Pool(step.modes)
    if isinstance(step, files.Normalize):
        return UnitLength()
    if isinstance(step, files.Cut):
        return FirstNumbers(step.width)
    if isinstance(step, files.Splade):
        raise files.ModelFilesError("SpladePooling takes logits: it must be the first step")
    module = Project(step) if isinstance(step, files.Dense) else Norm(step)
    load_weights(module, step.folder)
    return module


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the last token's vector of each row, (batch, width), for rows padded on the right."""
    # A masked sum rather than a gather, so that it also works on packed tokens.
    place = torch.arange(mask.shape[1], device=mask.device)
    is_last = (place == mask.sum(1, keepdim=True) - 1) & (mask != 0)
    return hidden.masked_fill(is_last.logical_not().unsqueeze(-1), 0.0).sum(1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (_sum(hidden, mask) / _count(mask)).to(hidden.dtype)


def _mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    return (_sum(hidden, mask) / _count(mask).sqrt()).to(hidden.dtype)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean with weight n for the n-th token."""
    weight = mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (_sum(hidden, weight) / _count(weight)).to(hidden.dtype)


def _max(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(1)


def _sum(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum in float32, also for half precision, as sentence-transformers
    does."""
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
