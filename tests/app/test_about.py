"""What the page says about the model, from its config.json alone."""

import json
import re
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "app"))
import about


@pytest.fixture
def config():
    row = {"resolution": 224, "view": "single", "images": 50000, "headline": True}
    row |= {"top1": 78.1, "top1_low": 77.7, "top1_high": 78.5, "top5": 94.0}
    return {
        "name": "a <b> & c",
        "dataset": "Imagenette",
        "licence": "mit",
        "architecture": {"arch": "resnet50"},
        "labels": [{"wnid": f"n{k}", "name": name} for k, name in enumerate(["English_springer", "tench", "church"])],
        "results": [row],
        "training": {"seconds": 75, "dollars": None, "device": None, "epochs": 1.0},
        "recipe": {"training": {"epochs": 1}},
        "curve": [{"epoch": 0, "train_loss": 2.0}, {"epoch": 1, "train_loss": 1.0, "top1": 50.0}],
        "links": {"code": 'https://github.com/O/"r', "dataset": None, "licence": "https://x.org/mit", "commit": None},
        "probabilities": {"temperature": 0.6, "unsure_below": 0.354},
    }


def test_the_title_links_to_what_is_known_and_to_nothing_else(config):
    shown = about.title(config, 3, None, "me/net")
    assert re.findall(r'<a href="(.*?)" target="_blank">(.*?)</a>', shown) == [
        ("https://huggingface.co/me/net", "Model"),
        ("https://github.com/O/&quot;r", "Code"),
        ("https://x.org/mit", "MIT licence"),
    ]
    assert "<h1>a &lt;b&gt; &amp; c</h1><p>ResNet-50, trained from scratch on Imagenette: 3 classes." in shown
    bare = about.title(config | {"dataset": None, "links": dict.fromkeys(config["links"])}, 3)
    assert "trained from scratch on images of 3 classes." in bare
    assert "<a" not in bare


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "1 minute"),
        (89, "1 minute"),
        (1300, "22 minutes"),
        (3600, "1 hour"),
        (77000, "21.4 hours"),
    ],
)
def test_durations(seconds, words):
    from rn50.publishing import card

    assert about.duration(seconds) == card.duration(seconds) == words


def test_the_figures_say_nothing_of_what_was_not_recorded(config):
    def words(training):
        return " ".join(re.sub("<[^>]+>", " ", about.about(config | {"training": training})).split())

    text = words(config["training"])
    assert "1 minute of training on a machine that was not recorded 1 epoch of 1 in the recipe" in text
    assert "224 px, one view, 50,000 images" in text
    assert "price" not in text
    assert "$1.50 for the training 1 minute on" in words(config["training"] | {"dollars": 1.5})


def test_the_curve_is_drawn_of_what_there_is(config):
    drawn = about.curve(config["curve"])
    assert 'points="0.00 4.76 100.00 52.38"' in drawn  # the largest loss is 5 % below the top
    assert 'points="100.00 50.00"' in drawn
    assert 'aria-label="By epoch: training loss from 2.00 to 1.00 and validation top-1 from 50.0 to 50.0 %"' in drawn
    assert about.curve(config["curve"][:1]) == ""


def test_the_api_shows_an_answer_with_the_models_own_classes(config):
    text = about.api_text("https://me.hf.space", 5, 20_000_000, config)
    answer = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert [entry["label"] for entry in answer["confidences"]] == ["English springer", "tench", "church"]
    assert (answer["label"], answer["unsure"], answer["model"]) == ("English springer", False, "a <b> & c")
    assert "less than 0.35" in text.replace("\n", " ")
    code = [
        line for block in re.findall(r"```(?:bash|js|python)\n(.*?)```", text, re.DOTALL) for line in block.split("\n")
    ]
    assert max(map(len, code)) <= 40  # what a phone has room for
