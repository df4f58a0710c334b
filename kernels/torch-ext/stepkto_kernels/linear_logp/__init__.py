"""Log-probabilities (and entropies) of target tokens under a linear head, without storing logits. See README.md."""
