"""The README's figure is what its script draws from the files of today."""

import re

import pytest

from studies.first_screen import figure
from tests.conftest import ROOT

NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def test_the_committed_figure_is_what_the_script_draws(tmp_path, capsys):
    figure.main(["--out", str(tmp_path / "figure.svg")])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'figure.svg'}\n"
    drawn = (tmp_path / "figure.svg").read_text()
    kept = (ROOT / "studies/first_screen/figure.svg").read_text()
    again = "the figure is not of today's files: .venv/bin/python studies/first_screen/figure.py"
    # another processor may round otherwise, and names within the file follow from the numbers
    (drawn, kept) = (re.sub(r'(?<=["#])[mp][0-9a-f]{10}\b', "", text) for text in (drawn, kept))
    assert NUMBER.split(drawn) == NUMBER.split(kept), again
    values = [[float(value) for value in NUMBER.findall(text)] for text in (drawn, kept)]
    assert values[0] == pytest.approx(values[1], abs=0.05), again
