"""The two baselines of the Step-KTO value function, from per-token values. See README.md."""
