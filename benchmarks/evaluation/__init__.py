"""The evaluation: workloads, arms, a runner, and tables and pictures of what it wrote.

`benchmarks/evaluate.py` is the command; `benchmarks/README.md` has the protocol.
"""
