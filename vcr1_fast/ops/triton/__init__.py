"""Triton kernels of the ops, for GPUs without our CUDA build: no nvcc at hand, or AMD.

One module an op, imported at the first call of its "triton" backend (`backend.from_triton`), so
that `import vcr1_fast.ops` needs no Triton. With TRITON_INTERPRET=1 the same kernels run on CPU
tensors, slowly, for tests.

Lengths and strides are run-time arguments on which Triton must not specialise: another batch
shape never compiles another kernel. What compiles one: the dtype, which optional tensors are there,
whether addresses and rows are aligned for vector loads, the options of a loss and, on AMD, tensors
of 2 GiB and more.
"""
