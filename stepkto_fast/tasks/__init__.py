"""Tasks: where problems come from, and how they are asked; `task.py` puts both kinds behind one protocol.

`arithmetic` is the embedded task, with an exact checker of answers and of steps. `math` reads mathematics with gold
answers: the known data sets, the shipped sample (`math_sample.jsonl`) or one's own files; `gold` finds the answers.
"""
