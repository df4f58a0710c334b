"""Policy and reference log-probabilities and the exact full-vocabulary KL between them. See README.md."""
