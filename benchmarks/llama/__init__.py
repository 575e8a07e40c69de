"""llama.cpp, for the benchmarks that compare with it: fetched, built, and its own tools run."""
