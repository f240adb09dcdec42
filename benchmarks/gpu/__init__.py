"""`python -m benchmarks gpu`: a few minutes of a GPU, turned into correctness and numbers.

The parent (`run`) is the standard library alone and holds no device: it starts processes with hard
limits (`processes`, `measuring`), writes down all that they say (`output`), and goes on whatever
hangs or dies. `stages` says what is run, `worker` measures, `machine` tells where.
"""
