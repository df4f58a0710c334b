"""The study: does stepwise feedback win? `python -m stepkto_fast.study` runs it, docs/study.md tells what it found."""
