"""What a file is that somebody gives for a checkpoint, where it is none of this project's."""

import os
import pickletools
import zipfile
from pathlib import Path

import torch

# How torch.save began its files before version 1.6: torchvision's older weights are such files.
OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# First bytes of what is not to be read as a checkpoint at all.
BEGINNINGS = {
    b"\x89HDF": "an HDF5 file, as Keras writes them",
    b"\x1f\x8b": "packed with gzip",
    b"\xfd7zXZ": "packed with xz",
    b"7z\xbc\xaf": "packed with 7-zip",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"version https://git-lfs": "a pointer of Git LFS in the place of the file (git lfs pull fetches it)",
    b"\x80": "pickled by something else than torch.save",
}
PUBLISHED = "; tools/check_data.py --weights FILE evaluates weights of others"


def kind(path):
    """(what the file at `path` is, what to do about it or ""); None where it may be a checkpoint, but damaged."""
    path = Path(path)
    if path.is_dir():
        return "a folder", f"; name the file, {path / 'last.pt'}" if (path / "last.pt").exists() else ""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return "an empty file", ""
    if head.startswith(b"PK"):
        return _archive(path)
    if head.startswith(OLD_FORMAT):
        return _old(path)
    for beginning, words in BEGINNINGS.items():
        if head.startswith(beginning):
            return words, ""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path):
        return "a safetensors file", PUBLISHED
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a")):
        return "an ONNX file", ""
    return _text(head)


def contents(state):
    """The same for what torch.load has read."""
    if not isinstance(state, dict):
        return f"a saved {type(state).__name__}", ""
    if isinstance(state.get("format"), int) and "config" in state:
        return f"of format {state['format']} and another version", ""
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        return "a state_dict, weights and nothing else", PUBLISHED
    names = [str(key) for key in state]
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"a checkpoint of another program (it holds {shown or 'nothing'})", PUBLISHED


def _archive(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
                return "a TorchScript archive", ""
            (pickle,) = [name for name in names if name.endswith("/data.pkl")] or [None]
            if pickle is None:
                return "a zip archive of something else", ""
            with archive.open(pickle) as file:
                return _pickled(file)
    except (zipfile.BadZipFile, ValueError):
        return None


def _old(path):
    try:
        return contents(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:
        with open(path, "rb") as file:
            try:
                for _ in range(3):  # a magic number, torch's protocol, the machine
                    list(pickletools.genops(file))
                return _pickled(file)
            except ValueError:
                return None


def _pickled(file):
    """What a pickle is, by its names, without making any object of it; None where there is nothing that torch.load
    would not make itself."""
    operations = [(operation.name, argument) for operation, argument, _ in pickletools.genops(file)]
    classes = [argument.replace(" ", ".") for name, argument in operations if name == "GLOBAL"]
    strange = [name for name in classes if not name.startswith(("torch._utils.", "torch.storage.", "collections."))]
    strange = [name for name in strange if not hasattr(torch, name.removeprefix("torch."))]
    if not strange:
        return None
    at_the_top = next((name for name, _ in operations if name not in ("PROTO", "FRAME", "BINPUT", "MEMOIZE")), None)
    if at_the_top == "EMPTY_DICT" or classes[0] == "collections.OrderedDict":
        return f"a checkpoint of another program, with an object of {strange[0]} in it", PUBLISHED
    return "a pickled module", f" (its class is {strange[0]}); save its state_dict where that code is"


def _text(head):
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not merely a letter that the end cuts
            return None
        text = head[: error.start].decode()
    if "\0" in text:
        return None
    return "a web page" if text.lstrip()[:9].lower().startswith(("<!doctype", "<html")) else "a text file", ""
