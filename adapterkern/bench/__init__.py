"""The engine behind `adapterkern bench` and `python -m benchmarks`: what an adapter costs."""
