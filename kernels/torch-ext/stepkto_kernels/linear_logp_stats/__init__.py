"""What else one pass over a head's logits can tell of each token, logits never stored. See README.md."""
