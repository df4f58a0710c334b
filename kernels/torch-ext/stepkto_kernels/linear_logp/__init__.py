"""Log-probabilities (and entropies) of tokens under a linear head, logits never stored. See README.md."""
