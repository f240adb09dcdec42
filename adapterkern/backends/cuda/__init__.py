"""The CUDA backend: the kernels of csrc/, through the extension `adapterkern._cuda`."""
