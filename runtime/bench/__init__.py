"""Benchmarks of a bundle: each graph and the whole reply, compared with the machine's roofline (docs/bench.md).

Nothing here needs torch: what is measured beside it comes in through `omniport.runtime.bench.workloads.Rival`.
"""
