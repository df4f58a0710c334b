"""Tasks: where problems come from, and who judges answers and steps exactly.

A task has `problems(...)`, `read_problems(path)`, `answer_is_right(problem, completion)` and
`check_steps(problem, steps)`. `arithmetic` is the embedded one.
"""
