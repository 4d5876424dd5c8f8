"""Measuring a bundle: each graph and the whole reply, beside what the machine could do (see docs/bench.md).

Nothing here needs torch: what is measured beside it comes in through `omniport.runtime.bench.workloads.Rival`.
"""
