"""Triton kernels of talos-fast, imported as ``talos_fast.kernels``.

Nothing runs here: other libraries import any folder called ``kernels`` that they find on the path.
"""
