"""The C source of the fast path, compiled twice on x86-64: rn50/data/native.py takes the one that runs here."""

import platform

from setuptools import Extension, setup

FLAGS = [
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-Wall",
    "-Wextra",
    "-Wstrict-aliasing=2",
    "-Wno-psabi",
]
VARIANTS = {"_decode": [], "_decode_v3": ["-march=x86-64-v3"]}
if platform.machine() != "x86_64":
    del VARIANTS["_decode_v3"]

setup(
    ext_modules=[
        Extension(
            f"rn50.data.{name}",
            ["rn50/data/csrc/decode.c"],
            depends=["rn50/data/csrc/decode.h"],
            extra_compile_args=FLAGS + flags,
            libraries=["m", "pthread"],
        )
        for name, flags in VARIANTS.items()
    ]
)
