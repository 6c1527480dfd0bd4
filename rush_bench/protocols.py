"""The names of the fine-tuning protocols, in words: for cards and help. No torch is imported."""

import re

IN_WORDS = {
    "SLF": "standard linear fine-tuning: a linear head learns from clean images by cross-entropy, the encoder frozen in eval "
    "mode",
    "NSLF": "noisy standard linear fine-tuning, RUSH's second stage: a linear head learns from images under the defence's "
    "noise; of the encoder nothing moves but BatchNorm, as finetune.bn_adapt says",
    "ALF": "adversarial linear fine-tuning: a linear head learns from images attacked through head and encoder, the encoder "
    "frozen in eval mode",
    "AFF": "adversarial full fine-tuning: all weights, from those of the encoder on, learn from attacked images (TRADES, or "
    "PGD-AT for Chen 2020b)",
    "supervised": "all weights learn from the labels, without a pre-training stage",
}


def in_words(protocol: str) -> str | None:
    """What a card's protocol means, which may be more than a name (`partial AFF`); None where it has none of these names."""
    found = re.search(rf"\b({'|'.join(IN_WORDS)})\b", protocol)
    return IN_WORDS[found[0]] if found else None
