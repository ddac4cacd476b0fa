# SPDX-License-Identifier: Apache-2.0
"""BERTScore, by bert-score: how near answers come to references in meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from firstlm.errors import ConfigError
from firstlm.metrics import Scores, means, paired


class BertScore:
    """Scores texts with one encoder, which is loaded once.

    Args:
        encoder: folder or hub id of an encoder, whose last layer is taken.
        device: where it computes.

    Raises:
        ConfigError: bert-score is not installed, or `encoder` is no encoder.
    """

    def __init__(self, encoder: str, device: str = "cpu") -> None:
        try:
            from bert_score import BERTScorer
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"BERTScore needs {error.name}: install it with `pip install 'firstlm[bertscore]'`."
            ) from error
        from transformers import AutoConfig

        try:
            layers = AutoConfig.from_pretrained(encoder).num_hidden_layers
            self._scorer: Any = BERTScorer(encoder, num_layers=layers, device=device)
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{encoder} is no encoder for BERTScore ({error}); expected a folder or hub id of "
                "a model such as BERT or RoBERTa."
            ) from error

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        """Return F1 (in percent, not rescaled); an empty prediction has 0.

        Args:
            predictions: one an item.
            references: one or more an item; the nearest one counts.
        """
        pairs = paired(predictions, references)
        found = [0.0] * len(pairs)
        # bert-score cannot write an empty text as tokens of transformers 5.
        said = [i for i, (text, _) in enumerate(pairs) if text.strip()]
        if said:
            texts = [pairs[i][0] for i in said]
            wanted = [[ref for ref in pairs[i][1] if ref.strip()] or ["."] for i in said]
            scores = self._scorer.score(texts, wanted)[2].tolist()
            for i, value in zip(said, scores, strict=True):
                found[i] = value
        return means(found)
