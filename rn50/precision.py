"""Which floating-point type autocast computes in."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast_dtype(precision, device):
    """The dtype of `precision`: bf16, fp16, fp32, or auto.

    `auto` is bf16 where the processor multiplies in it, else fp16 on GPUs and fp32 on CPUs.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Without these instructions a CPU emulates bf16, several times slower than fp32.
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has no such function
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def precisions(device):
    """The names of the types in which `device` may be fastest: fp16 and bf16 on GPUs, fp32 and bf16 on processors.

    bf16 only where `device` multiplies in it.
    """
    plain = "fp16" if device.type == "cuda" else "fp32"
    return [plain, "bf16"] if autocast_dtype("auto", device) == torch.bfloat16 else [plain]


def dtype_name(dtype):
    """torch.bfloat16 -> bfloat16."""
    return str(dtype).removeprefix("torch.")
