"""An exported model: what is in its folder, that it is the checkpoint's network, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from PIL import Image

from rn50.data.imagenet import IMAGENETTE_NAMES
from rn50.errors import RunError
from rn50.publishing import calibration, card, export
from rn50.training import checkpoint
from tests import tiny_model
from tests.conftest import ROOT
from tests.odd_pictures import odd_pictures
from tools import export_model

sys.path.insert(0, str(ROOT / "app"))
import inference


@pytest.fixture(scope="module")
def config(exported):
    return json.loads((exported[0] / "config.json").read_text())


def run(*arguments):
    command = [sys.executable, str(ROOT / "tools/export_model.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def network_of(path, *, ema=True):
    state = checkpoint.load(path)
    return export.load_network(export.architecture(state), state["ema"]["model"] if ema else state["model"])


@pytest.fixture(scope="module")
def odd_files(textures, tmp_path_factory):
    """Kaggle's form of a few validation images; in one the camera lay on its side, as in some of ImageNet's.

    One is transparent, which torchvision would show otherwise than the page, and one is cut off.
    """
    root = tmp_path_factory.mktemp("odd")
    folder = root / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    folder.mkdir(parents=True)
    rows = ["ImageId,PredictionString"]
    for k, path in enumerate(sorted(textures.glob("val/*/0000.jpg"))):
        with Image.open(path) as picture:
            exif = Image.Exif()
            exif[0x0112] = 6 if k == 3 else 1
            stored = picture.transpose(Image.Transpose.ROTATE_90) if k == 3 else picture
            stored.save(folder / f"image_{k}.JPEG", quality=95, exif=exif)
        rows.append(f"image_{k},{path.parent.name} 1 2 3 4")
    for name in ("translucent.png", "xmp_6.jpeg", "plain_cut_0.6.jpeg"):
        (folder / name).with_suffix(".JPEG").write_bytes(odd_pictures()[name].data)
        rows.append(f"{Path(name).stem},{path.parent.name} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows))
    return root


def test_the_exported_network_is_the_checkpoints_ema_on_real_images(exported, tiny_checkpoint, textures, config):
    files = sorted(textures.glob("val/*/000[0-4].jpg"))
    images = torch.from_numpy(np.stack([tiny_model.seen(path) for path in files]))
    ema, last = network_of(tiny_checkpoint), network_of(tiny_checkpoint, ema=False)
    stored = export.load_network(config["architecture"], export.read_safetensors(exported[0] / "model.safetensors"))
    model = inference.Classifier(exported[0], file="model.onnx")
    logits = ema(images).numpy()
    assert np.abs(last(images).numpy() - logits).max() > 0.1
    np.testing.assert_allclose(stored(images).numpy(), logits, atol=1e-5)
    np.testing.assert_allclose(model.run(images.numpy())[0], logits, atol=1e-4)
    assert config["weights"] == "ema"
    for path, expected in zip(files, logits, strict=True):  # through the app, from the file's bytes
        np.testing.assert_allclose(model.predict(path.read_bytes()).logits, expected, atol=1e-3)


def test_onnx_has_a_dynamic_batch_features_and_weights_that_give_the_maps(exported):
    network = onnx.load(exported[0] / "model.onnx")
    onnx.checker.check_model(network)
    assert isinstance(network.graph.input[0].type.tensor_type.shape.dim[0].dim_param, str)
    session = inference.onnxruntime.InferenceSession(exported[0] / "model.onnx")
    names = ["logits", "features", "classifier_weight"]
    for batch in (1, 3):
        images = np.random.default_rng(0).normal(size=(batch, 3, 64, 64)).astype(np.float32)
        logits, features, weight = session.run(names, {"images": images})
        assert (logits.shape, features.shape, weight.shape) == ((batch, 10), (batch, 512, 2, 2), (10, 512))
        # a class's score is the mean of its map, but for the bias: the maps explain the logits
        means = np.einsum("kc,nchw->nk", weight, features) / features[0, 0].size
        bias = logits - means
        np.testing.assert_allclose(bias, np.broadcast_to(bias[:1], bias.shape), atol=1e-3)


def test_config_has_what_the_contract_names(config, betons, tiny_checkpoint):
    prepared = config["preprocessing"]
    assert (prepared["resolution"], prepared["crop_ratio"]) == (64, 0.875)
    assert prepared["mean"] == [123.675, 116.28, 103.53]
    assert [label["wnid"] for label in config["labels"]][:2] == ["bricks", "cells"]
    assert config["architecture"] == {"arch": "resnet18", "num_classes": 10, "blurpool": True, "blur_maxpool": True}
    row = checkpoint.load(tiny_checkpoint)["progress"]["rows"][-1]
    assert {(r["resolution"], r["view"]): r["top1"] for r in config["results"]} == {
        (64, view): row["evaluation"][64][view]["top1"] for view in ("single", "flip")
    }
    assert [r["view"] for r in config["results"] if r["headline"]] == ["single"]
    manifest = json.loads((betons / "val_96.json").read_text())
    assert config["data"]["val_96.beton"] == manifest["beton"]["sha256"]
    assert config["training"]["commit"]
    assert config["recipe"]["training"]["batch_size"] == 40
    assert config["format"] == 2
    # where the files were is nobody's business
    assert str(betons) not in json.dumps(config)
    assert "logging" not in config["recipe"]


def test_agreement_with_a_pil_evaluation_of_the_files_is_measured(config, textures, tiny_checkpoint, exported):
    measured = config["agreement"]
    files = sorted(textures.glob("val/*/*.jpg"))
    names = [label["wnid"] for label in config["labels"]]
    logits = network_of(tiny_checkpoint)(torch.from_numpy(np.stack([tiny_model.seen(path) for path in files]))).numpy()
    right = np.mean([names[k] == path.parent.name for k, path in zip(logits.argmax(1), files, strict=True)])
    assert measured["images"] == len(files) == 110
    assert measured["pil_top1"] == pytest.approx(100 * right)
    assert right > 0.3, "the fixture's network should know something"
    assert abs(measured["app_top1"] - measured["pil_top1"]) <= 0.1
    assert measured["logits"] <= 1e-3
    assert "110 image files, through the app's own code" in exported[1]


def test_the_8_bit_network_is_judged_and_used_only_when_it_is_as_good(config, exported):
    judged = config["int8"]
    good = judged["points"] >= -0.3 and judged["milliseconds"] < judged["fp32_milliseconds"]
    assert (judged["verdict"] == "taken") == good
    assert (exported[0] / "model_int8.onnx").exists() == good
    assert config["network"] == ("model_int8.onnx" if good else "model.onnx")


def test_the_probabilities_are_calibrated_on_the_validation_images(config, exported, betons, textures):
    data, model = export_model.Data(betons), inference.Classifier(exported[0], file="model.onnx")
    pairs = [(model.run(model.prepare(picture)[None])[0][0], label) for picture, label in data.images("val", 110)]
    logits, labels = np.array([logits for logits, _ in pairs]), np.array([label for _, label in pairs])
    shown = config["probabilities"]
    assert (shown["fitted_images"], shown["images"]) == (55, 55)
    assert shown == pytest.approx(calibration.calibrate(logits, labels), rel=1e-3)
    assert shown["ece"] < shown["ece_before"], "the fixture's network should be too sure"
    seen = [model.predict(path.read_bytes()) for path in sorted(textures.glob("val/*/*.jpg"))]
    assert 0 < np.mean([prediction.unsure for prediction in seen]) < 0.8
    text = (exported[0] / "README.md").read_text()
    assert f"softmax(logits / {shown['temperature']:.2f})" in text
    assert f"{shown['ece']:.1f} points off on average" in text
    assert f"{shown['wrong_unsure']:.0f} % of its wrong answers." in text


def test_the_page_in_a_browser_gets_a_network_that_was_judged(config, exported, betons):
    judged, data = config["browser"], export_model.Data(betons)
    assert judged["network"] == ("model_int8.onnx" if config["network"] == "model_int8.onnx" else "model_w8.onnx")
    assert judged["bytes"] == (exported[0] / judged["network"]).stat().st_size
    right = {}
    for file in ("model.onnx", judged["network"]):
        model = inference.Classifier(exported[0], file=file)
        answers = [
            (model.run(model.prepare(picture)[None])[0].argmax(), label) for picture, label in data.images("val", 110)
        ]
        right[file] = 100 * np.mean([given == label for given, label in answers])
    assert judged["images"] == len(answers) == 110
    assert judged["top1"] == pytest.approx(right[judged["network"]])
    assert judged["points"] == pytest.approx(right[judged["network"]] - right["model.onnx"])
    assert judged["low"] <= judged["points"] <= judged["high"]
    size = f"The page in a browser runs `{judged['network']}`, {judged['bytes'] / 1e6:.1f} MB, 110 validation images: "
    assert f"{size}{judged['top1']:.2f} % top-1, " in (exported[0] / "README.md").read_text()
    assert size.replace("`", "") in exported[1]


@pytest.mark.parametrize("verdict", ["taken", "left out, not faster", None])
def test_the_page_in_a_browser_takes_the_8_bit_network_where_the_other_page_does(verdict, exported, betons, tmp_path):
    for name in ("model.onnx", "config.json"):
        shutil.copy(exported[0] / name, tmp_path)
    shutil.copy(tmp_path / "model.onnx", tmp_path / "model_int8.onnx")
    int8 = verdict and {"verdict": verdict, "int8_top1": 70.5, "points": -0.2, "low": -0.6, "high": 0.2}
    right = np.zeros(20, bool)
    judged = export_model.for_browser(tmp_path, export_model.Data(betons), int8, right)
    if verdict == "taken":
        assert not (tmp_path / "model_w8.onnx").exists()
        assert (judged["network"], judged["top1"], judged["points"]) == ("model_int8.onnx", 70.5, -0.2)
    else:
        assert judged["network"] == "model_w8.onnx"
        assert judged["points"] == pytest.approx(judged["top1"])
        assert judged["images"] == 20
        assert judged["top1"] > 20
        assert judged["bytes"] == (tmp_path / "model_w8.onnx").stat().st_size


def test_a_network_that_is_much_worse_in_a_browser_is_kept_and_said(config, exported, capsys):
    for points, said in ((-0.29, False), (-0.31, True)):
        export_model.report(exported[0], config | {"browser": config["browser"] | {"points": points}})
        assert ("note: the page in a browser is more than 0.3 points worse" in capsys.readouterr().out) == said


def test_nothing_of_an_earlier_export_stays(tmp_path):
    old, new = tmp_path / "model", tmp_path / "new"
    for folder, name in ((old, "model_w8.onnx"), (new, "model_int8.onnx")):
        folder.mkdir()
        (folder / name).touch()
    export_model.replace(old, new)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/model_int8.onnx"]


def test_weights_in_8_bits_give_what_float_ones_give(exported, textures, tmp_path):
    export.write_w8(exported[0] / "model.onnx", tmp_path / "w8.onnx")
    shutil.copy(exported[0] / "config.json", tmp_path)
    onnx.checker.check_model(tmp_path / "w8.onnx", full_check=True)
    assert (tmp_path / "w8.onnx").stat().st_size < 0.28 * (exported[0] / "model.onnx").stat().st_size
    expected, model = (
        inference.Classifier(exported[0], file="model.onnx"),
        inference.Classifier(tmp_path, file="w8.onnx"),
    )
    seen = np.stack([tiny_model.seen(path) for path in sorted(textures.glob("val/*/*.jpg"))])
    (logits, features), (others, theirs) = expected.run(seen), model.run(seen)
    apart = np.abs(expected.probabilities(logits) - model.probabilities(others)).max(1)
    # its logits go up to 18: a trained ResNet-50's probabilities are 0.001 apart on average (studies/browser)
    assert 0 < apart.mean() < 0.008
    maps = expected.activation_maps(features[0]), model.activation_maps(theirs[0])
    assert 0 < np.abs(maps[0] - maps[1]).max() < 0.08


def test_large_weights_are_stored_once_in_8_bits_and_small_ones_in_float(exported, config, tmp_path):
    export.write_w8(exported[0] / "model.onnx", tmp_path / "w8.onnx")
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "w8.onnx").graph.initializer]
    in_8_bits = [tensor.size for tensor in tensors if tensor.dtype == np.int8]
    assert max(tensor.size for tensor in tensors if tensor.dtype == np.float32) < export.W8_LEAST <= min(in_8_bits)
    weights = export.read_safetensors(exported[0] / "model.safetensors").values()
    assert sum(in_8_bits) == sum(weight.numel() for weight in weights if weight.numel() >= export.W8_LEAST)


def test_balanced_rounding():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.uniform(-127, 127, (50, 301)), rng.uniform(126.5, 127, (2, 301)), np.zeros((1, 301))])
    rows[:50, :2] = -127, 127
    rows = rows.astype(np.float32)
    rounded = export.balanced_rounding(rows)
    errors = rounded - rows
    assert (np.abs(errors) < 1).all()
    assert (rounded == np.rint(rounded)).all()
    assert np.abs(rounded).max() == 127
    assert (np.abs(errors.sum(1)) < 0.51).all()
    # no more than it takes, and those that cost least
    nearest = np.rint(rows) - rows
    assert ((np.abs(errors) > 0.5).sum(1) == np.abs(np.rint(nearest.sum(1)))).all()
    assert np.mean(errors[:50] ** 2) < 1.03 * np.mean(nearest[:50] ** 2)


def test_the_8_bit_network_has_the_classifiers_weight_once(exported, textures, tmp_path):
    seen = np.stack([tiny_model.seen(path) for path in sorted(textures.glob("val/*/000[0-4].jpg"))])
    export.write_int8(exported[0] / "model.onnx", tmp_path / "int8.onnx", [seen])
    shutil.copy(exported[0] / "config.json", tmp_path)
    network = onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(network, full_check=True)
    shapes = [tuple(tensor.dims) for tensor in network.graph.initializer]
    assert shapes.count((10, 512)) == 1
    expected = inference.Classifier(exported[0], file="model.onnx")
    model = inference.Classifier(tmp_path, file="int8.onnx")
    maps = [classifier.activation_maps(model.run(seen[:1])[1][0]) for classifier in (expected, model)]
    assert 0 < np.abs(maps[0] - maps[1]).max() < 0.05


def test_paired_difference():
    right = np.array([True] * 80 + [False] * 20)
    other = np.array([True] * 78 + [False] * 22)
    points, low, high = export.paired_difference(right, other)
    assert points == pytest.approx(-2)
    assert low == pytest.approx(-2 - 1.96 * 100 * np.sqrt(0.02 * 0.98 / 99), abs=0.01)
    assert low < points < high
    assert export.paired_difference(right, right) == (0, 0, 0)


def test_the_card_has_front_matter_results_cost_limits_and_licence(exported, config):
    text = (exported[0] / "README.md").read_text()
    front, body = text.split("---\n", 2)[1:]
    front = yaml.safe_load(front)
    assert front["license"] == "mit"
    headline = card.headline_row(config)
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == round(headline["top1"], 2)
    assert f"| 64 px, single view (headline) | {headline['top1']:.2f} % | {headline['top1_low']:.2f} to" in body
    sections = re.findall("^## (.*)", body, re.MULTILINE)
    assert (sections[0], sections[-2:]) == ("Limits", ["Where it comes from", "Licence"])
    assert "sha256" not in body.split("## Where it comes from")[0]
    for words in (
        "trained from scratch on generated textures, 10 classes",
        "The weights are under the [MIT](https://choosealicense.com/licenses/mit/) licence.",
        "CC0 1.0, generated",
        " of training on",
        "110 image files",
    ):
        assert words in body
    assert "1 of 1 epoch at 32 px, global batch 40, EMA weights" in body
    assert "learning rate 0.05 per 256 images" in body
    assert "not evaluated" not in body.lower()


def test_the_hubs_library_reads_the_card(exported, config):
    from huggingface_hub import ModelCard

    page = ModelCard.load(exported[0] / "README.md")
    (top1, top5), headline = page.data.eval_results, card.headline_row(config)
    assert (top1.metric_value, top5.metric_value) == (round(headline["top1"], 2), round(headline["top5"], 2))
    assert (top1.task_type, top1.dataset_type) == ("image-classification", "generated-textures")
    assert page.data.pipeline_tag == "image-classification"
    for dataset, wnids in (("imagenet-1k", [f"n{k:08d}" for k in range(1000)]), ("frgfm/imagenette", IMAGENETTE_NAMES)):
        named = config | {"dataset": card.dataset_name([{"wnid": wnid} for wnid in wnids])}
        data = ModelCard(card.model_card(named)).data
        assert (data.datasets, data.eval_results[0].dataset_type) == ([dataset], dataset)


def test_the_cards_sentences_where_something_is_not_known(config):
    assert card.dataset_name([{"wnid": "cat"}, {"wnid": "dog"}]) is None
    bare = {"commit": None, "device": None, "dollars": None}
    odd = config | {"dataset": None, "results": [], "training": config["training"] | bare | {"seconds": 75}}
    odd |= {"licence": "other", "links": dict.fromkeys(config["links"])}
    odd["probabilities"] = calibration.calibrate(np.eye(3), np.arange(3))
    text = card.model_card(odd)
    assert "trained from scratch on images of 10 classes." in text
    assert "- 1 minute of training on a machine that was not recorded (evaluations not counted)\n" in text
    assert "The weights have a licence of their own." in text
    assert "None " not in text.split("```yaml")[0]
    code = "https://github.com/OWNER/rn50"
    odd["links"] |= {"code": code, "commit": f"{code}/commit/0123"}
    odd["training"] |= {"commit": "0123", "dollars": 15.9, "seconds": 7200, "device": "NVIDIA A10G", "world_size": 2}
    text = card.model_card(odd)
    assert f"commit [`0123`]({code}/commit/0123); exported with" in text
    assert "- 2 hours of training on 2 x NVIDIA A10G (evaluations not counted); $15.90 in all\n" in text


def test_the_code_of_the_card_runs_as_it_stands(exported, textures, tmp_path):
    shutil.copytree(exported[0], tmp_path, dirs_exist_ok=True)
    picture = next(textures.glob("val/*/0003.jpg"))
    shutil.copy(picture, tmp_path / "picture.jpg")
    code = (exported[0] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    model = inference.Classifier(exported[0])
    seen = model.predict(picture.read_bytes())
    expected = [f"{100 * seen.probabilities[k]:5.1f} %  {model.labels[k]['name']}" for k in seen.top(5)]
    assert done.stdout.splitlines() == expected, done.stderr


def test_examples_lose_their_metadata(tiny_checkpoint, textures, tmp_path):
    from PIL import Image

    picture = Image.open(next(textures.glob("val/*/0001.jpg")))
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    picture.save(tmp_path / "a photo.jpg", exif=exif)
    import tools.export_model as tool

    (written,) = tool.write_examples(tmp_path, [tmp_path / "a photo.jpg"], "CC0")
    assert written == {"file": "examples/01_a_photo.jpg", "licence": "CC0"}
    assert b"taken at home" not in (tmp_path / written["file"]).read_bytes()
    with pytest.raises(RunError, match="not a picture"):
        tool.write_examples(tmp_path, [ROOT / "README.md"], "CC0")


def test_a_wrong_export_is_refused(exported, tiny_checkpoint, betons, config):
    """The check after writing finds a network that is not the checkpoint's."""
    import tools.export_model as tool

    data = tool.Data(betons)
    with pytest.raises(RunError, match="the onnx file gives other logits than the checkpoint"):
        tool.check_files(exported[0], config["architecture"], network_of(tiny_checkpoint, ema=False), data)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--checkpoint", "nowhere/last.pt"], 1, "error: no checkpoint at nowhere/last.pt"),
        (["--checkpoint", "docs"], 1, "error: no checkpoint at docs/last.pt"),
        (["--checkpoint", "README.md"], 1, "error: checkpoint README.md cannot be read"),
        (["--examples", "a.jpg"], 2, "error: --examples are published: say under what licence"),
        (["--licence", "CC BY 4.0"], 2, "error: --licence CC BY 4.0: the Hub's name is asked for"),
        (["--data", "docs"], 1, "error: no train_SIZE.beton in docs; name the run's folder of them with --data"),
        (["--out", "docs"], 2, "error: docs exists and is not an exported model; choose another --out"),
    ],
    ids=["missing", "folder", "damaged", "examples", "licence", "data", "out"],
)
def test_refusals(arguments, status, message, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    import tools.export_model as tool

    monkeypatch.chdir(ROOT)
    base = ["tool", "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*base, *arguments])
    monkeypatch.setattr(os, "_exit", sys.exit)  # command.run would end the tests, too
    with pytest.raises(SystemExit) as leaving:
        tool.run(tool.main)
    printed = capsys.readouterr().err
    assert leaving.value.code == status
    assert printed.startswith(message)
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_labels_of_other_betons_are_refused(tiny_checkpoint, betons, tmp_path, monkeypatch, capsys):
    import tools.export_model as tool

    other = shutil.copytree(betons, tmp_path / "other")
    for path in other.glob("*.json"):
        manifest = json.loads(path.read_text())
        manifest["classes"].append({"wnid": "z", "name": "z"})
        path.write_text(json.dumps(manifest))
    base = ["tool", "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "out"), "--data", str(other)]
    monkeypatch.setattr(sys, "argv", base)
    monkeypatch.setattr(os, "_exit", sys.exit)  # command.run would end the tests, too
    with pytest.raises(SystemExit):
        tool.run(tool.main)
    assert "has 11 classes, the checkpoint 10" in capsys.readouterr().err


def test_files_lying_on_their_side_and_in_any_form_are_compared(exported, odd_files, tiny_checkpoint, config):
    measured = export_model.compare_on_files(exported[0], network_of(tiny_checkpoint), odd_files, 13, config)
    assert measured["images"] == 12
    assert measured["logits"] <= 1e-3
