"""Where a model comes from, as addresses that a visitor can open: its code, the commit that trained it, its images."""

import re
import subprocess
from pathlib import Path

# What comes between a repository's address and a commit's id.
FORGES = {
    "github.com": "commit",
    "gitlab.com": "-/commit",
    "bitbucket.org": "commits",
    "codeberg.org": "commit",
    "huggingface.co": "commit",
}
DATASETS = {"ImageNet-1k": "https://www.image-net.org", "Imagenette": "https://github.com/fastai/imagenette"}
# What the Hub calls licences that choosealicense.com explains under the same name.
EXPLAINED = ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0")
EXPLAINED += ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "unlicense")
# https://user:token@host/owner/name.git, ssh://git@host:22/owner/name or git@host:owner/name
REMOTE = re.compile(
    r"(?:(?:https?|ssh|git)://(?:[^/@]+@)?([\w.-]+)(?::\d+)?/|(?:\w+@)([\w.-]+):/?)([\w.-]+(?:/[\w.-]+)+)/?"
)


def links(dataset, commit, licence):
    """{code, commit, dataset, licence}: an address each, or None.

    dataset: as card.dataset_name calls it. commit: of the run, as environment.json has it, with `-dirty` where files
    differed from it. licence: of the weights, as the Hub calls it.
    """
    code = web_address(_origin())
    return {
        "code": code,
        "commit": commit_address(code, commit),
        "dataset": DATASETS.get(dataset),
        "licence": f"https://choosealicense.com/licenses/{licence}/" if licence in EXPLAINED else None,
    }


def web_address(remote):
    """The page of a git remote on a forge, without credentials; None for a folder and for other servers."""
    found = REMOTE.fullmatch(remote or "")
    if not found:
        return None
    host = (found[1] or found[2]).lower().removeprefix("www.").replace("hf.co", "huggingface.co")
    path = found[3].removesuffix(".git")
    return f"https://{host}/{path}" if host in FORGES else None


def commit_address(code, commit):
    """The page of a commit of the repository whose page is `code`; None where one of the two is not known."""
    if not code or not commit:
        return None
    return f"{code}/{FORGES[code.split('/')[2]]}/{commit.removesuffix('-dirty')}"


def _origin():
    root = Path(__file__).resolve().parent
    try:
        asked = ["git", "remote", "get-url", "origin"]
        return subprocess.run(asked, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
