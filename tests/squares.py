"""Problems for the operator of squared per-sample gradients, their answer in float64, and what rounding may cost."""

import torch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(samples, tokens, outs, ins, dtype=torch.float32, score_dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, tokens, ins, generator=generator).to(device, dtype)
    grads = torch.randn(samples, tokens, outs, generator=generator).to(device, dtype)
    scores = torch.rand(outs, ins, generator=generator).to(device, score_dtype)
    return scores, inputs, grads


def exact(scores, inputs, grads):
    per_sample = torch.einsum("nto,nti->noi", grads.double(), inputs.double())
    return scores.double() + per_sample.square().sum(0)


def tolerance(scores, inputs):
    # What summing in the scores' dtype costs; the inputs' own rounding is the same on both sides.
    eps = torch.finfo(scores.dtype).eps
    if inputs.is_cuda and inputs.dtype is scores.dtype is torch.float32:
        eps = 3 * 2.0**-18  # products of bfloat16 parts
    return dict(rtol=8 * eps * max(1, inputs.shape[1]) ** 0.5, atol=8 * eps * max(1, inputs.shape[0] * inputs.shape[1]))


def kernel(scores, inputs, grads):
    """The compiled operator itself: on CUDA the function takes another way for tiny shapes."""
    torch.ops.talos_fast.accumulate_squared_per_sample_(scores, inputs, grads)
    return scores
