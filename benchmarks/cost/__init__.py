"""The processes that benchmarks/build_cost.py watches."""
