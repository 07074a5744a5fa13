"""Cases, input makers, tolerances and timers, shared by tests/ and benchmarks/."""
