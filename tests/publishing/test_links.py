"""Where a model comes from: addresses that a visitor can open, and nothing that is nobody's business."""

import pytest

from rn50.publishing import links


@pytest.mark.parametrize(
    ("remote", "code", "commit"),
    [
        ("https://github.com/OWNER/rn50.git", "https://github.com/OWNER/rn50", "/commit/"),
        ("https://me:ghp_secret@github.com/OWNER/rn50", "https://github.com/OWNER/rn50", "/commit/"),
        ("https://GitHub.com/OWNER/rn50/", "https://github.com/OWNER/rn50", "/commit/"),
        ("git@github.com:OWNER/rn50.git", "https://github.com/OWNER/rn50", "/commit/"),
        ("ssh://git@gitlab.com:22/group/team/rn50.git", "https://gitlab.com/group/team/rn50", "/-/commit/"),
        ("git@bitbucket.org:OWNER/rn50.git", "https://bitbucket.org/OWNER/rn50", "/commits/"),
        ("https://codeberg.org/OWNER/rn50.git", "https://codeberg.org/OWNER/rn50", "/commit/"),
        ("git@hf.co:OWNER/rn50", "https://huggingface.co/OWNER/rn50", "/commit/"),
    ],
)
def test_a_remote_on_a_forge_becomes_its_page_without_credentials(remote, code, commit, monkeypatch):
    monkeypatch.setattr(links, "_origin", lambda: remote)
    found = links.links("Imagenette", "0123abc-dirty", "apache-2.0")
    assert found == {
        "code": code,
        "commit": f"{code}{commit}0123abc",
        "dataset": "https://github.com/fastai/imagenette",
        "licence": "https://choosealicense.com/licenses/apache-2.0/",
    }
    assert links.links("ImageNet-1k", None, "other") == {
        "code": code,
        "commit": None,
        "dataset": "https://www.image-net.org",
        "licence": None,
    }


@pytest.mark.parametrize(
    "remote",
    [
        None,
        "",
        "/srv/git/rn50",
        "../rn50",
        "file:///srv/rn50",
        "https://git.example.org/a/b",
        "git@192.0.2.1:a/b",
        "x:y",
    ],
)
def test_a_folder_or_a_server_of_ones_own_is_not_shown(remote, monkeypatch):
    monkeypatch.setattr(links, "_origin", lambda: remote)
    assert links.links(None, "0123abc", "mit") == {
        "code": None,
        "commit": None,
        "dataset": None,
        "licence": "https://choosealicense.com/licenses/mit/",
    }
