"""Which number type a device multiplies in."""

import torch


def autocast_dtype(precision, device):
    """`auto` is bf16 where the processor multiplies in it, else fp16 on GPUs and fp32 on CPUs."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        # Without these instructions a CPU emulates bf16, several times slower than fp32.
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")
