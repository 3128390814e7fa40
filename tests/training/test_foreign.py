"""A file that is no checkpoint of this project is called what it is, and nothing in it is run."""

import argparse
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from rn50.errors import RunError
from rn50.training import checkpoint
from tests.commands import Command

WEIGHTS = "tools/check_data.py --weights FILE"


@pytest.fixture(scope="module")
def network():
    return models.resnet18(num_classes=3)


def make(network, path):
    """Writes what `path` is named after."""
    weights = network.state_dict()
    old = {"_use_new_zipfile_serialization": False}
    match path.stem:
        case "module":
            torch.save(network, path)
        case "old module":
            torch.save(nn.DataParallel(network), path, **old)
        case "state_dict":
            torch.save(weights, path)
        case "old state_dict":
            torch.save(weights, path, **old)
        case "with arguments":
            torch.save({"epoch": 3, "state_dict": weights, "args": argparse.Namespace(lr=1)}, path)
        case "with weights":
            torch.save({"epoch": 3, "arch": "resnet18", "state_dict": weights, "optimizer": {}, "best": 1}, path)
        case "format 1":
            torch.save({"format": 1, "config": {}, "model": weights}, path)
        case "list":
            torch.save([weights], path)
        case "safetensors":
            save_file(weights, path)
        case "onnx":  # its first fields: a version and who wrote it
            path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x06" + bytes(100))
        case "torchscript":
            torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
        case "npz":
            np.savez(path.open("wb"), np.ones(3))
        case "keras":
            path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
        case "gzip":
            path.write_bytes(b"\x1f\x8b\x08" + bytes(100))
        case "pickle":
            path.write_bytes(pickle.dumps(network))
        case "text":
            path.write_text("Gewichte für alle\n" * 400)
        case "web page":
            path.write_text("\n<!DOCTYPE html><html>Sign in</html>")
        case "git lfs":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
            (path / "last.pt").touch()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("module", ["a pickled module, not a checkpoint of this project", "torchvision.models.resnet.ResNet"]),
        ("old module", ["a pickled module, not", "torch.nn.parallel.data_parallel.DataParallel"]),
        ("state_dict", ["a state_dict, weights and nothing else", WEIGHTS]),
        ("old state_dict", ["a state_dict, weights and nothing else", WEIGHTS]),
        ("with arguments", ["of another program, with an object of argparse.Namespace in it", WEIGHTS]),
        ("with weights", ["of another program (it holds epoch, arch, state_dict, optimizer, …)", WEIGHTS]),
        ("format 1", ["of format 1", "not a checkpoint of format 2"]),
        ("list", ["a saved list"]),
        ("safetensors", ["a safetensors file", WEIGHTS]),
        ("onnx", ["an ONNX file"]),
        ("torchscript", ["a TorchScript archive"]),
        ("npz", ["a zip archive of something else"]),
        ("keras", ["an HDF5 file"]),
        ("gzip", ["packed with gzip"]),
        ("pickle", ["pickled by something else than torch.save"]),
        ("text", ["a text file"]),
        ("web page", ["a web page"]),
        ("git lfs", ["Git LFS"]),
        ("empty", ["an empty file"]),
        ("folder", ["a folder", "folder.pt/last.pt"]),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_a_file_is_is_said(network, tmp_path, name, words):
    path = tmp_path / f"{name}.pt"
    make(network, path)
    with pytest.raises(RunError) as refusal:
        checkpoint.load(path)
    message = str(refusal.value)
    for word in [str(path), *words]:
        assert word in message
    assert message.isprintable()  # no terminal escapes, no second line
    assert "weights_only" not in message


@pytest.mark.parametrize("name", ["module", "state_dict"])
def test_what_is_cut_off_is_damaged_whatever_it_was(network, tmp_path, name):
    path = tmp_path / f"{name}.pt"
    make(network, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(RunError, match=r"cannot be read .*damaged"):
        checkpoint.load(path)


def test_an_archive_without_torchs_pickle_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02not a pickle")
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load(tmp_path / "x.pt")


def test_eval_only_of_a_pickled_module_is_one_line(network, betons, tmp_path):
    make(network, tmp_path / "module.pt")
    flags = {"training__eval_only": "true", "training__checkpoint": tmp_path / "module.pt"}
    with Command(betons, tmp_path, **flags) as command:
        assert command.end() == 1
    loading, line = command.output().splitlines()
    assert loading == "loading ..."
    assert line.startswith(
        f"error: checkpoint {tmp_path}/module.pt cannot be read: it is a pickled module, not a check"
    )
