"""The parts of FFCV that are used, without what importing it does on the side.

FFCV 1.0.2 sets torch to one thread, and has numba compile a typed dictionary for the names of its two image modes: half
of what a command takes to start. A plain dictionary does as well, for FFCV's own decoders too.
"""
# ruff: noqa: F401 - loaders and decode import them from here

import numba.typed
import torch

_torch_threads = torch.get_num_threads()
numba.typed.Dict = dict
try:
    from ffcv.fields.basics import IntDecoder, IntField
    from ffcv.fields.rgb_image import RGBImageField, SimpleRGBImageDecoder
    from ffcv.loader import Loader, epoch_iterator
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import Graph
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import ToDevice, ToTensor, ToTorchImage
finally:
    del numba.typed.Dict  # numba's own again, which it finds by its module's __getattr__
    torch.set_num_threads(_torch_threads)
