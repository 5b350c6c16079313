"""Fused kernels: InfoNCE (infonce.py), Sinkhorn (sinkhorn.py) and MAE masking (mae_mask.py). Each file is complete by itself:
formulas, a PyTorch reference, the Triton kernels and the functions to call. bench.py measures them."""


def path(device):
    """Which implementation runs for tensors on this torch.device, in words, for a training script to print."""
    if device.type != "cuda":
        return "PyTorch path (Triton kernels need a CUDA device)"
    try:
        import triton
    except ImportError:
        return "PyTorch path (triton is not installed)"
    return f"Triton {triton.__version__} kernels"
